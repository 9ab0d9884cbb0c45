"""FSPAD in the cascade: what its two parts reduce to, and which loss reaches which half."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_target

import specjax

N, T, D = 2, 7, 16


@pytest.fixture(scope="module")
def target():
    return toy_target()


def unrolled(target, params=None, **fields):
    """(parameters, definition, jitted params -> (hidden, features), each N x T x D)."""
    drafter = specjax.init_drafter("fasteagle", target, seed=3, num_layers=N, **fields)
    rng = np.random.default_rng(0)
    taps = rng.normal(size=(1, T, 3 * D)).astype(np.float32)
    tokens = rng.integers(12, size=(1, T))

    @jax.jit
    def run(params):
        outs = drafter.definition.unroll(params, target.params, taps, tokens)
        return tuple(jnp.stack(out)[:, 0] for out in outs)

    return drafter.params, run


def test_feature_sampling_without_its_down_projection_is_the_plain_entry(target):
    params, run = unrolled(target, entry="sampled")
    plain_params, plain = unrolled(target)
    closed = params | {"sampling": params["sampling"] | {"down": 0 * params["sampling"]["down"]}}
    expected = plain({k: v for k, v in params.items() if k != "sampling"})
    np.testing.assert_allclose(run(closed)[0], expected[0], atol=1e-6)
    assert np.abs(np.asarray(run(params)[0] - expected[0])).max() > 0.1
    assert jax.tree.structure(plain_params) == jax.tree.structure(
        {k: v for k, v in params.items() if k != "sampling"}
    )


def test_equal_halves_are_a_plain_cascade(target):
    params, run = unrolled(target, partial_alignment=True)
    _, plain = unrolled(target)
    tied, whole = [], []
    for layer in params["layers"]:
        half = layer["mlp"]["down"][:, :D]
        tied.append(layer | {"mlp": layer["mlp"] | {"down": jnp.concatenate([half, half], 1)}})
        whole.append(layer | {"mlp": layer["mlp"] | {"down": half}})
    hidden, features = run(params | {"layers": tied})
    expected, _ = plain(params | {"layers": whole})
    np.testing.assert_allclose(hidden, expected, atol=1e-6)
    np.testing.assert_allclose(features, expected, atol=1e-6)


def test_each_loss_reaches_its_own_half(target):
    """Depth 2: its own layer by halves; the layer before it through what it hands on, alone."""
    params, run = unrolled(target, partial_alignment=True)
    weights = np.random.default_rng(1).normal(size=(T, D))
    for part, own in ((0, slice(0, D)), (1, slice(D, 2 * D))):
        grads = jax.grad(lambda p, part=part: jnp.sum(weights * run(p)[part][1]))(params)
        first, second = (np.asarray(layer["mlp"]["down"]) for layer in grads["layers"])
        other = slice(D, 2 * D) if part == 0 else slice(0, D)
        assert np.abs(second[:, own]).max() > 0 and (second[:, other] == 0).all()
        assert np.abs(first[:, D:]).max() > 0 and (first[:, :D] == 0).all()


def test_a_wide_layer_cannot_be_split(target):
    with pytest.raises(ValueError, match="partial_alignment: entry 'wide_qkv'"):
        specjax.init_drafter("fasteagle", target, entry="wide_qkv", partial_alignment=True)
