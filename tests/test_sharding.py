"""Sharding rules are strict data: everything matches, nothing is left over, the first one wins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from configs import common
from specjax.distillation.deepkd import DeepKD
from specjax.drafters import DRAFTERS
from specjax.drafters.base import split_buffers
from specjax.models.config import ModelConfig
from specjax.models.transformer import init_params, stack_layers
from specjax.sharding import (
    AXES,
    MODEL_RULES,
    batch_sharding,
    check_mesh,
    check_rules,
    leaf_sharding,
    make_mesh,
    path_of,
    replicated,
    shardings,
    spec_of,
)
from specjax.training.optimizers import make_optimizer
from specjax.training.state import create

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=8,
    num_kv_heads=4, head_dim=8, qkv_bias=True, o_bias=True, qk_norm=True,
)  # fmt: skip
RULES = (("kernel", ("fsdp", "tensor")), ("bias", ()), ("scale", (None,)))


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def parameters(**changes):
    """A target's parameter tree: shapes only."""
    return jax.eval_shape(
        lambda key: init_params(key, CONFIG.replace(**changes)), jax.random.key(0)
    )


DRAFTERS_TO_PLACE = [
    *((name, {}) for name in DRAFTERS if name != "kangaroo"),
    ("kangaroo", {"exit_layer": 1}),
    ("fasteagle", {"entry": "wide_qkv", "draft_vocab_size": 32}),
    ("fasteagle", {"entry": "sampled"}),
    ("fasteagle_x", {"rank": 4}),
    ("draft_model", {"stop": "specdec"}),
    ("rasd", {"inner": "fasteagle"}),
]
TREE = {"a": {"kernel": abstract(4, 6), "bias": abstract(6)}, "scale": abstract(6)}


def pretend_mesh(*sizes):
    """A mesh of devices that do not exist: enough to lay parameters out on paper."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def specs(tree, rules):
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: spec_of(path_of(keys), leaf.shape, rules), tree
    )


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    return {path_of(keys): leaf for keys, leaf in leaves}


def test_paths():
    tree = {"layers": [{"attn": {"qkv": 1}}, {"attn": {"qkv": 2}}], "pair": (3, 4)}
    assert list(by_path(tree)) == ["layers/0/attn/qkv", "layers/1/attn/qkv", "pair/0", "pair/1"]


def test_first_matching_rule_wins():
    assert specs(TREE, RULES) == {
        "a": {"kernel": P("fsdp", "tensor"), "bias": P()},
        "scale": P(None),
    }
    first = specs(TREE, (("a/.*", ("data",)), *RULES))
    assert first["a"] == {"kernel": P(None, "data"), "bias": P("data")}
    assert first["scale"] == P(None)


def test_one_rule_serves_a_parameter_wherever_it_is():
    """Inside optimiser state and other drafters, and with leading axes, which stay whole."""
    for path in ("kernel", "params/kernel", "opt_state/1/0/mu/layers/3/kernel"):
        assert spec_of(path, (4, 6), RULES) == P("fsdp", "tensor")
        assert spec_of(path, (3, 2, 4, 6), RULES) == P(None, None, "fsdp", "tensor")
    assert spec_of("opt_state/count", (), RULES) == P()
    with pytest.raises(ValueError, match="no rule matches parameter opt_state/other"):
        spec_of("opt_state/other", (2,), RULES)


def test_a_parameter_without_a_rule_is_an_error():
    for missing, rules in (("scale", RULES[:2]), ("a/kernel", RULES[1:]), ("a/bias", RULES[::2])):
        with pytest.raises(ValueError, match=f"no rule matches parameter {missing}"):
            specs(TREE, rules)
    # A rule has to match whole names, up to the end of the path.
    for part in ("a/b", "ias", "a"):
        with pytest.raises(ValueError, match="no rule matches parameter a/bias"):
            specs(TREE, ((part, ()), *RULES[::2]))
    with pytest.raises(ValueError, match="no rule matches parameter a/bias"):
        leaf_sharding(pretend_mesh(1, 1, 1), "a/bias", abstract(6), RULES[::2])


def test_a_rule_that_matches_nothing_is_an_error():
    check_rules(TREE, RULES)
    for typo in ("kernels", "a/kerne", "b/bias"):
        with pytest.raises(ValueError, match=f"rule {typo!r} matches no parameter"):
            check_rules(TREE, ((typo, ()), *RULES))


def test_a_rule_of_too_many_dimensions_is_an_error():
    with pytest.raises(ValueError, match=r"does not fit a/bias of shape \(6,\)"):
        specs(TREE, (("a/.*", ("fsdp", "tensor")), *RULES))
    with pytest.raises(ValueError, match="does not fit"):  # nor so many that it cannot be meant
        spec_of("scale", (2, 2, 2, 6), RULES)


def test_model_rules_cover_a_target():
    """Every matrix of both layouts is split by a rule of its own; only vectors are replicated."""
    both = {"list": parameters(), "stacked": jax.eval_shape(stack_layers, parameters())}
    check_rules(both, MODEL_RULES)
    for layout, tree in both.items():
        shapes, found = by_path(tree), by_path(specs(tree, MODEL_RULES))
        assert set(shapes) == set(found)
        for path, leaf in shapes.items():
            names, last = set(found[path]) - {None}, path.rsplit("/", 1)[-1]
            split = {"scale": set(), "o_bias": set(), "qkv_bias": {"tensor"}}
            assert names == split.get(last, {"fsdp", "tensor"}), path
            assert len(found[path]) == leaf.ndim, path
            if layout == "stacked" and "layers" in path:
                assert found[path][0] is None, "the L axis is scanned, not split"
    layer = by_path(specs(both["list"], MODEL_RULES))
    for path, spec in by_path(specs(both["stacked"], MODEL_RULES)).items():
        if "layers/" in path:
            assert spec == P(None, *layer[path.replace("layers/", "layers/1/")]), path


@pytest.mark.parametrize("name, fields", DRAFTERS_TO_PLACE, ids=str)
def test_every_drafter_and_its_optimiser_state_are_covered(name, fields):
    """By rules of the drafter's own, each of which is used, and those of the model's layers."""
    family, target = DRAFTERS[name], parameters()
    definition = family.of(CONFIG, fields)
    params = jax.eval_shape(lambda p: definition.init(jax.random.key(0), p), target)
    rules = (*definition.partition, *MODEL_RULES)
    kernels = [path for path, leaf in by_path(params).items() if leaf.ndim > 1]
    for path, spec in by_path(specs(params, rules)).items():
        split = set(spec) - {None}
        assert not split if path.startswith("buffers") or path not in kernels else split, path
    if not definition.trained:
        return
    trainable, _ = split_buffers(params)
    kernels = [path for path in kernels if not path.startswith("buffers")]
    for kind in ("adamw", "muon"):
        for deepkd in (None, DeepKD(steps=4)):
            cfg = common.optimizer()
            cfg.name = kind
            state = jax.eval_shape(
                lambda p, cfg=cfg, deepkd=deepkd: create(p, make_optimizer(cfg, 4, deepkd)),
                trainable,
            )
            found = by_path(specs(state, rules))
            moments = [p for p in found if p.startswith("opt_state") and p.endswith(kernels[0])]
            assert moments and all(set(found[p]) - {None} for p in moments)


def test_heads_stay_whole_and_inputs_meet_outputs():
    """Tensor parallelism splits k/v heads and MLP width the same way on both sides of a layer."""
    spec = by_path(specs(parameters(), MODEL_RULES))
    shape = by_path(parameters())
    qkv, o = "layers/0/attn/qkv", "layers/0/attn/o"
    assert shape[qkv].shape[spec[qkv].index("tensor")] == CONFIG.num_kv_heads
    assert spec[o].index("tensor") == 0  # rows of o are heads x head_dim
    gate_up, down = "layers/0/mlp/gate_up", "layers/0/mlp/down"
    assert shape[gate_up].shape[spec[gate_up].index("tensor")] == CONFIG.intermediate_size
    assert shape[down].shape[spec[down].index("tensor")] == CONFIG.intermediate_size


def test_an_axis_that_does_not_divide_is_an_error():
    mesh = pretend_mesh(1, 2, 4)
    with pytest.raises(
        ValueError, match=r"'tensor' = 4 does not divide dimension 1 of a/kernel, shape \(4, 6\)"
    ):
        shardings(mesh, TREE, RULES)
    both = (("scale", (("fsdp", "tensor"),)),)
    assert leaf_sharding(mesh, "scale", abstract(8), both).spec == P(("fsdp", "tensor"))
    with pytest.raises(ValueError, match="= 8 does not divide dimension 0 of scale"):
        leaf_sharding(mesh, "scale", abstract(12), both)


def test_a_mesh_that_does_not_divide_the_model_is_refused_by_field():
    check_mesh(pretend_mesh(3, 2, 4), CONFIG)
    for mesh, words in (
        ((1, 1, 8), "tensor = 8 does not divide num_kv_heads = 4"),
        ((1, 3, 1), "fsdp = 3 does not divide hidden_size = 32"),
    ):
        with pytest.raises(ValueError, match=f"mesh: {words}"):
            check_mesh(pretend_mesh(*mesh), CONFIG)


def test_batches_of_decoding_are_split_where_they_can_be():
    mesh = pretend_mesh(2, 2, 2)
    assert batch_sharding(mesh, 8).spec == P(("data", "fsdp"))
    assert batch_sharding(mesh, 6).spec == batch_sharding(mesh, 1).spec == P()


def test_one_leaf_is_sharded_as_in_its_tree():
    mesh, tree = pretend_mesh(2, 2, 4), parameters(tie_word_embeddings=True)
    whole = by_path(shardings(mesh, tree))
    for path, leaf in by_path(tree).items():
        assert leaf_sharding(mesh, path, leaf) == whole[path]
        whole[path].shard_shape(leaf.shape)  # raises where a dimension does not divide


def test_mesh_of_the_devices_here():
    count = len(jax.devices())
    for shape in ((-1, 1, 1), (1, -1, 1), (count, 1, 1), [1, 1, -1]):
        mesh = make_mesh(shape)
        assert mesh.axis_names == AXES and mesh.size == count
        assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh((1, 1, 1)).devices.item() == jax.devices()[0]
    mesh = make_mesh()
    assert batch_sharding(mesh).spec == P(("data", "fsdp"))
    whole = jax.device_put(np.ones((4, 2)), replicated(mesh))
    assert whole.sharding.is_fully_replicated
    placed = jax.device_put(np.ones((4 * count, 2)), batch_sharding(mesh))
    assert len(placed.addressable_shards) == count


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 1), "3 entries"),
        ((1, 1, 1, 1), "3 entries"),
        ((10_000, 1, 1), "does not cover"),
        ((-1, 10_000, 1), "does not cover"),
        ((-1, -1, 1), "mesh"),
        ((0, -1, 1), "mesh"),
        ((-2, 1, 1), "mesh"),
    ],
)
def test_mesh_errors(shape, words):
    with pytest.raises(ValueError, match=f"mesh: .*{words}" if words != "mesh" else "^mesh: "):
        make_mesh(shape)
