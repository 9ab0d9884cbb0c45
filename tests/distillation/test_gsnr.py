"""The signal-to-noise ratio of gradients: against NumPy, and its probe in a chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax.distillation import gsnr
from specjax.distillation.deepkd import STREAMS, deepkd_trace


def _tree(seed, lead=()):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "w": jax.random.normal(keys[0], (*lead, 3, 2)),
        "b": jax.random.normal(keys[1], (*lead, 4)),
    }


@jax.jit
def online(gradients_M):
    """The value after M gradients, stacked on the first axis of every leaf, one by one."""
    start = gsnr.gsnr_init(jax.tree.map(lambda g: g[0], gradients_M))
    add = lambda moments, gradient: (gsnr.gsnr_update(moments, gradient), None)  # noqa: E731
    return gsnr.gsnr_value(jax.lax.scan(add, start, gradients_M)[0])


def test_gsnr_equals_numpy():
    gradients = jax.tree.map(lambda g: g + 0.5, _tree(8, lead=(7,)))
    gradients["unreached"] = jnp.zeros((7, 3))  # no signal, no noise: does not count
    flat = np.concatenate([np.reshape(gradients[k], (7, -1)) for k in "wb"], axis=1)
    expected = np.mean(flat.mean(0) ** 2 / flat.var(0, ddof=1))
    np.testing.assert_allclose(online(gradients), expected, rtol=1e-4)


def test_gsnr_scales_with_the_signal():
    noise = _tree(9, lead=(200,))
    weak, strong = (online(jax.tree.map(lambda g, c=c: g + c, noise)) for c in (0.0, 1.0))
    assert weak < 0.05 < 0.7 < strong < 1.5
    doubled = jax.tree.map(lambda g: 2 * (g + 1.0), noise)
    np.testing.assert_allclose(online(doubled), strong, rtol=1e-4)


def test_gsnr_of_too_little_is_zero():
    moments = gsnr.gsnr_init(_tree(0))
    assert gsnr.gsnr_value(moments) == 0
    assert gsnr.gsnr_value(gsnr.gsnr_update(moments, _tree(1))) == 0


def test_the_probe_sees_every_stream_and_changes_nothing():
    streams = [{s: _tree(10 * i + j) for j, s in enumerate(STREAMS)} for i in range(4)]
    plain, probed = deepkd_trace(), optax.chain(gsnr.probe_gsnr(), deepkd_trace())
    a, b = plain.init(_tree(0)), probed.init(_tree(0))
    for grads in streams:
        (x, a), (y, b) = plain.update(grads, a), probed.update(grads, b)
        jax.tree.map(np.testing.assert_array_equal, x, y)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *streams)
    expected = {f"gsnr_{s}": float(online(stacked[s])) for s in STREAMS}
    assert gsnr.probed_gsnr(b) == pytest.approx(expected, rel=1e-4)
    assert gsnr.probed_gsnr(a) == {}
