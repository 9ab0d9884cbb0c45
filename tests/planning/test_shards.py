"""What a device holds, and that its program is the whole one at the shapes it holds."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from specjax.drafters import DRAFTERS
from specjax.models.config import ModelConfig
from specjax.models.known import KNOWN
from specjax.planning import shards
from specjax.sharding import AXES, drafter_rules, path_of

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=8,
    num_kv_heads=4, head_dim=8,
)  # fmt: skip


def pretend_mesh(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(keys): leaf.shape for keys, leaf in leaves}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_a_device_computes_with_what_it_holds(tensor, scan):
    mesh = pretend_mesh(2, 1, tensor)
    params = shards.target_shapes(CONFIG, "float32", scan)
    here = shards.share_of_model(mesh, CONFIG, params)
    held = shapes(shards.shard_shapes(mesh, params))
    own = shapes(shards.target_shapes(here, "float32", scan))
    assert own == held


def test_heads_that_do_not_divide_are_refused():
    params = shards.target_shapes(CONFIG, "float32", False)
    with pytest.raises(ValueError, match="tensor"):
        shards.share_of_model(pretend_mesh(1, 1, 8), CONFIG, params)


@pytest.mark.parametrize("name", ["fasteagle", "eagle3"])
def test_a_drafter_computes_with_what_is_held_of_it(name):
    mesh = pretend_mesh(2, 1, 4)
    params = shards.target_shapes(CONFIG, "float32", False)
    definition = DRAFTERS[name].of(CONFIG, {"draft_vocab_size": 32 * (name == "eagle3")})
    whole, _ = shards.drafter_shapes(definition, params)
    target = shards.share_of_model(mesh, CONFIG, params)
    rules = drafter_rules(definition.partition)
    here = shards.share_of_drafter(mesh, definition, whole, target, rules)
    own, _ = shards.drafter_shapes(here, shards.target_shapes(target, "float32", False))
    held = shapes(shards.shard_shapes(mesh, whole, rules))
    # Split along the features that go in, which the program of one device keeps whole.
    own = {k: v for k, v in shapes(own).items() if k not in ("fc", "entry")}
    assert own == {k: held[k] for k in own} and held["fc"] == (
        3 * CONFIG.hidden_size // 4,
        CONFIG.hidden_size,
    )


@pytest.mark.parametrize("name", list(DRAFTERS))
def test_every_drafter_has_a_share(name):
    mesh = pretend_mesh(1, 1, 2)
    params = shards.target_shapes(CONFIG, "float32", False)
    definition = DRAFTERS[name].of(CONFIG, {})
    whole, _ = shards.drafter_shapes(definition, params)
    target = shards.share_of_model(mesh, CONFIG, params)
    rules = drafter_rules(definition.partition)
    assert shards.share_of_drafter(mesh, definition, whole, target, rules).nodes == definition.nodes


def test_one_device_holds_everything():
    params = shards.target_shapes(CONFIG, "bfloat16", False)
    assert shards.device_bytes(pretend_mesh(8, 1, 1), params) == 2 * shards.count(params)
    split = shards.device_bytes(pretend_mesh(1, 2, 2), params)
    assert shards.count(params) / 2 < split < shards.count(params) * 2 / 3  # norms stay whole


def test_a_batch_that_does_not_divide_is_refused():
    assert shards.batch_share(pretend_mesh(2, 2, 4), 8) == 2
    with pytest.raises(ValueError, match="train.batch_size: 6 is not a multiple of 4"):
        shards.batch_share(pretend_mesh(2, 2, 4), 6)


@pytest.mark.parametrize(
    "name, billions",
    [
        ("Qwen/Qwen3-0.6B", 0.596),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.030),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.554),
        ("lmsys/vicuna-13b-v1.3", 13.016),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8.030),
    ],
)
def test_known_geometries_have_the_published_sizes(name, billions):
    params = shards.target_shapes(KNOWN[name], "bfloat16", False)
    assert shards.count(params) / 1e9 == pytest.approx(billions, abs=0.0006)
