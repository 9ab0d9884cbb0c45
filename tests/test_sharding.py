"""Sharding rules are strict data: everything matches, nothing is left over, the first one wins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from specjax.models.config import ModelConfig
from specjax.models.transformer import init_params, stack_layers
from specjax.sharding import (
    AXES,
    MODEL_RULES,
    batch_sharding,
    check_rules,
    leaf_sharding,
    make_mesh,
    path_of,
    replicated,
    shardings,
    specs,
)

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=8,
    num_kv_heads=4, head_dim=8, qkv_bias=True, o_bias=True, qk_norm=True,
)  # fmt: skip
RULES = ((r".*/kernel", P("fsdp", "tensor")), (r".*/bias", P()), (r"scale", P(None)))


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def parameters(**changes):
    """A target's parameter tree: shapes only."""
    return jax.eval_shape(
        lambda key: init_params(key, CONFIG.replace(**changes)), jax.random.key(0)
    )


TREE = {"a": {"kernel": abstract(4, 6), "bias": abstract(6)}, "scale": abstract(6)}


def pretend_mesh(*sizes):
    """A mesh of devices that do not exist: enough to lay parameters out on paper."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


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
    first = specs(TREE, ((r"a/.*", P("data")), *RULES))
    assert first["a"] == {"kernel": P("data"), "bias": P("data")} and first["scale"] == P(None)


def test_a_parameter_without_a_rule_is_an_error():
    for missing, rules in (("scale", RULES[:2]), ("a/kernel", RULES[1:]), ("a/bias", RULES[::2])):
        with pytest.raises(ValueError, match=f"no rule matches parameter {missing}"):
            specs(TREE, rules)
    # A rule has to match the whole path, not some of it.
    with pytest.raises(ValueError, match="no rule matches parameter a/bias"):
        specs(TREE, ((r"a/b", P()), *RULES[::2]))
    with pytest.raises(ValueError, match="no rule matches parameter a/bias"):
        leaf_sharding(pretend_mesh(1, 1, 1), "a/bias", abstract(6), RULES[::2])


def test_a_rule_that_matches_nothing_is_an_error():
    check_rules(TREE, RULES)
    for typo in (r".*/kernels", r"a/kerne", r"bias"):
        with pytest.raises(
            ValueError, match=f"rule {typo!r} matches no parameter".replace("*", r"\*")
        ):
            check_rules(TREE, ((typo, P()), *RULES))


def test_a_rule_of_too_many_dimensions_is_an_error():
    with pytest.raises(ValueError, match=r"does not fit a/bias of shape \(6,\)"):
        specs(TREE, ((r"a/.*", P("fsdp", "tensor")), *RULES))
    assert specs(TREE, ((r"a/.*", P("fsdp", "tensor")), *RULES), strict=False)["scale"] == P(None)


def test_model_rules_cover_a_target():
    """Every matrix of both layouts is split by a rule of its own; only vectors are replicated."""
    both = {"list": parameters(), "stacked": jax.eval_shape(stack_layers, parameters())}
    check_rules(both, MODEL_RULES)
    for layout, tree in both.items():
        shapes, found = by_path(tree), by_path(specs(tree, MODEL_RULES))
        assert set(shapes) == set(found)
        for path, leaf in shapes.items():
            names = set(found[path]) - {None}
            small = path.rsplit("/", 1)[-1] in ("scale", "qkv_bias", "o_bias")
            assert names == (set() if small else {"fsdp", "tensor"}), path
            # A spec may be shorter than the shape for replicated leaves only.
            assert small or len(found[path]) == leaf.ndim, path
            if layout == "stacked" and "layers" in path and not small:
                assert found[path][0] is None, "the L axis is scanned, not split"
    layer = by_path(specs(both["list"], MODEL_RULES))
    for path, spec in by_path(specs(both["stacked"], MODEL_RULES)).items():
        if "layers/" in path and spec != P():
            assert spec == P(None, *layer[path.replace("layers/", "layers/1/")]), path


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


def test_axes_that_do_not_divide_are_dropped():
    mesh = pretend_mesh(1, 2, 4)
    tree = {"a": {"kernel": abstract(4, 6), "bias": abstract(6)}, "scale": abstract(8)}
    found = shardings(mesh, tree, ((r"scale", P(("fsdp", "tensor"))), *RULES))
    assert found["a"]["kernel"] == NamedSharding(mesh, P("fsdp", None))  # 6 over 4 ways does not go
    assert found["scale"] == NamedSharding(mesh, P(("fsdp", "tensor")))
    assert leaf_sharding(mesh, "a/kernel", abstract(3, 8), RULES).spec == P(None, "tensor")
    assert leaf_sharding(
        mesh, "scale", abstract(12), ((r"scale", P(("fsdp", "tensor"))),)
    ).spec == P(None)


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
