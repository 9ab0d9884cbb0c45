"""Gradient signal-to-noise ratio of DeepKD's streams: why the paper's deltas have their signs.

Source: arXiv 2505.15133, which argues with mean^2 / variance of each parameter's gradient but
releases no code that measures it. Training does not read it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from specjax.distillation.deepkd import STREAMS


class GradientMoments(NamedTuple):
    """Running moments (Welford) of one stream's gradient: two trees, however many are seen."""

    count: jax.Array
    mean: optax.Params
    squares: optax.Params  # summed squares of the deviations from the mean


def gsnr_init(params) -> GradientMoments:
    """Moments of no gradient."""
    zeros = optax.tree_utils.tree_zeros_like(params, dtype=jnp.float32)
    return GradientMoments(jnp.zeros((), jnp.int32), zeros, zeros)


def gsnr_update(moments: GradientMoments, gradient) -> GradientMoments:
    """The moments with one more gradient."""
    count = moments.count + 1
    off = jax.tree.map(jnp.subtract, gradient, moments.mean)
    mean = jax.tree.map(lambda m, d: m + d / count, moments.mean, off)
    squares = jax.tree.map(lambda s, d: s + d**2 * (1 - 1 / count), moments.squares, off)
    return GradientMoments(count, mean, squares)


def gsnr_value(moments: GradientMoments):
    """mean^2 / variance (unbiased) of each parameter's gradient, averaged over the parameters.

    Parameters without variance (embedding rows that no batch reached) are left out; where that is
    all of them, as after a single gradient, the value is 0.
    """

    def ratios(mean, squares):
        noisy = squares > 0
        ratio = mean**2 * (moments.count - 1) / jnp.where(noisy, squares, 1.0)
        return jnp.stack([jnp.sum(jnp.where(noisy, ratio, 0.0)), jnp.sum(noisy)])

    ratio, noisy = sum(jax.tree.leaves(jax.tree.map(ratios, moments.mean, moments.squares)))
    return ratio / jnp.maximum(noisy, 1)


class ProbeState(NamedTuple):
    """What `probe_gsnr` keeps: {stream: GradientMoments}."""

    moments: dict


def probe_gsnr() -> optax.GradientTransformation:
    """Passes the three streams on and keeps their moments: the first link of a chain."""

    def update(grads, state, params=None):
        del params
        return grads, ProbeState({s: gsnr_update(state.moments[s], grads[s]) for s in STREAMS})

    return optax.GradientTransformation(
        lambda params: ProbeState({s: gsnr_init(params) for s in STREAMS}), update
    )


def probed_gsnr(opt_state) -> dict[str, float]:
    """{"gsnr_tog": ..., ...} over all steps so far; {} where the state holds no probe."""
    is_probe = lambda node: isinstance(node, ProbeState)  # noqa: E731
    probes = [n for n in jax.tree.leaves(opt_state, is_leaf=is_probe) if is_probe(n)]
    return {f"gsnr_{s}": float(gsnr_value(m)) for p in probes for s, m in p.moments.items()}
