"""A target's fingerprint: it follows the weights, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_target

from specjax import sharding
from specjax.models.config import ModelConfig
from specjax.models.transformer import stack_layers

LAYERS = 5


@pytest.fixture(scope="module")
def target():
    fields = dict(num_layers=LAYERS, num_heads=4, num_kv_heads=2, qkv_bias=True, qk_norm=True)
    return toy_target(**fields, model_type="qwen3")


def changed(target, change, layers=range(LAYERS), leaf=None):
    """The target after change(weight) of one parameter, or of all, in some layers."""
    params = target.params | {"layers": list(target.params["layers"])}
    for i in layers:
        leaves, tree = jax.tree.flatten(params["layers"][i])
        leaves = [change(w) if leaf in (None, n) else w for n, w in enumerate(leaves)]
        params["layers"][i] = jax.tree.unflatten(tree, leaves)
    return dataclasses.replace(target, params=params)


def rank_one(weight):
    """What a merged adapter adds: one outer product, small against the weight."""
    rng = np.random.default_rng(0)
    flat = weight.reshape(weight.shape[0], -1)
    delta = np.outer(rng.normal(size=flat.shape[0]), rng.normal(size=flat.shape[1]))
    return weight + 0.02 * jnp.asarray(delta, weight.dtype).reshape(weight.shape)


def test_however_the_weights_are_held(target):
    cast = lambda tree: jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree)  # noqa: E731
    stacked = stack_layers(target.params)
    layouts = [stacked, cast(target.params), cast(stacked)]
    for shape in ((1, 2, 2), (2, 2, 1)):
        mesh = sharding.make_mesh(shape, jax.devices()[:4])
        for params in (target.params, stacked):
            layouts.append(sharding.place(params, sharding.shardings(mesh, params)))
    for params in layouts:
        assert dataclasses.replace(target, params=params).fingerprint == target.fingerprint


def test_whatever_changes_in_the_layers(target):
    assert changed(target, lambda w: 3 * w).fingerprint != target.fingerprint
    count = len(jax.tree.leaves(target.params["layers"][0]))
    one = {changed(target, rank_one, leaf=n).fingerprint for n in range(count)}
    assert len(one | {target.fingerprint}) == count + 1


@pytest.mark.parametrize("layer", [0, LAYERS // 2, LAYERS - 1])
def test_a_change_at_either_end_or_in_the_middle(target, layer):
    assert changed(target, rank_one, [layer]).fingerprint != target.fingerprint


@pytest.mark.parametrize("name", ["embed", "head", "final_norm"])
def test_a_change_outside_the_layers(target, name):
    params = target.params | {name: jax.tree.map(lambda w: w + 0.5, target.params[name])}
    assert dataclasses.replace(target, params=params).fingerprint != target.fingerprint


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "3", None])
def test_counts_are_positive_whole_numbers(target, field, value):
    fields = {f.name: getattr(target.config, f.name) for f in dataclasses.fields(ModelConfig)}
    with pytest.raises(ValueError, match=f"{field}: .* is not a positive whole number"):
        ModelConfig(**fields | {field: value})
