"""One filter for target, draft and extra token: temperature, then top-k, then top-p.

Nothing here sorts: thresholds are found by bisecting the bit pattern of the floats, which is exact
and costs 32 passes over one row.
"""

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp

# Logits divided by it still fit float32.
SMALLEST_TEMPERATURE = 1e-30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; static, so that greedy decoding compiles to argmax alone.

    temperature 0 is greedy and turns the filters off; top_k 0 and top_p 1 are off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: {self.temperature} must be a finite number >= 0")
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"temperature: {self.temperature} would overflow the logits; use 0 (greedy) or at "
                f"least {SMALLEST_TEMPERATURE}"
            )
        if not (self.top_k >= 0 and self.top_k % 1 == 0):
            raise ValueError(f"top_k: {self.top_k} must be a whole number >= 0 (0 is off)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} must be in (0, 1] (1 is off)")
        object.__setattr__(self, "top_k", 0 if self.greedy else int(self.top_k))
        if self.greedy:
            object.__setattr__(self, "top_p", 1.0)

    @property
    def greedy(self) -> bool:
        """Whether drawing means taking the first maximum."""
        return self.temperature == 0


GREEDY = Sampling()


def seed_key(seed: int):
    """The random key of a seed, which has 32 bits: a longer one would be cut to another seed's.

    Raises:
      ValueError: not a whole number, or one of more bits.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise ValueError(f"seed: {seed!r} is not a whole number") from None
    if not 0 <= number < 2**32:
        raise ValueError(f"seed: {number} must be in [0, 2**32)")
    return jax.random.key(number)


def argmax(x, axis: int = -1):
    """First index of the maximum, int32.

    Two plain reductions, which CPU compilers vectorise; the pair-wise reduction behind
    `jnp.argmax` they do not.
    """
    top = jnp.max(x, axis=axis, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim)
    return jnp.min(jnp.where(x == top, index, x.shape[axis]), axis=axis)


def top_candidates(scores, count: int):
    """(values, int32 indices) of the `count` largest along the last axis, first index on ties.

    Repeated argmax: for the few candidates of a draft it beats a sort. Scores must be finite:
    -inf marks what was already taken.
    """
    values, indices = [], []
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    for _ in range(count):
        best = argmax(scores)
        values.append(jnp.max(scores, axis=-1))
        indices.append(best)
        scores = jnp.where(index == best[..., None], -jnp.inf, scores)
    return jnp.stack(values, axis=-1), jnp.stack(indices, axis=-1)


_BLOCK = 64


def top_ids(scores, count: int):
    """int32 indices of the `count` largest along the last axis, best first, first index on ties.

    For many rows: one pass finds each block's maximum, and only the `count` best blocks, which
    hold the `count` best entries, are searched.
    """
    *rows, V = scores.shape
    blocks = -(-V // _BLOCK)
    if blocks <= count:
        return jax.lax.top_k(scores, count)[1].astype(jnp.int32)
    padding = [(0, 0)] * len(rows) + [(0, blocks * _BLOCK - V)]
    table = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(*rows, blocks, _BLOCK)
    # In index order, so that a tie between blocks goes to the first index too.
    best = jnp.sort(jax.lax.top_k(jnp.max(table, axis=-1), count)[1], axis=-1)
    found = jnp.take_along_axis(table, best[..., None], axis=-2).reshape(*rows, count * _BLOCK)
    place = jax.lax.top_k(found, count)[1]
    block = jnp.take_along_axis(best, place // _BLOCK, axis=-1)
    return (block * _BLOCK + place % _BLOCK).astype(jnp.int32)


def _ordered_bits(x):
    """int32 keys in the order of float32 values (-0.0 and 0.0 alike)."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.int32)
    return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def _largest_threshold(keys_V, enough):
    """The largest int32 t for which enough(keys >= t) holds (it does for the smallest)."""

    def halve(_, bounds):
        low, high = bounds  # enough(low) holds, enough(high + 1) does not
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounds up without overflow
        ok = enough(keys_V >= middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    start = jnp.min(keys_V), jnp.max(keys_V)
    low, _ = jax.lax.fori_loop(0, 32, halve, start)
    return low


def filtered_probs(logits_V, sampling: Sampling):
    """The distribution tokens are drawn from, float32, after temperature, top-k and top-p.

    top-k keeps the k largest logits and top-p the smallest set of most probable tokens whose mass
    (of what top-k left) reaches p; tokens tied with the last one kept are kept too, so that the
    result does not depend on an order of sorting. Greedy gives a point mass on the first maximum.
    """
    if sampling.greedy:
        return jax.nn.one_hot(argmax(logits_V), logits_V.shape[-1], dtype=jnp.float32)
    logits_V = logits_V.astype(jnp.float32)
    if 0 < sampling.top_k < logits_V.shape[-1]:
        keys_V = _ordered_bits(logits_V)
        kth = _largest_threshold(keys_V, lambda keep: jnp.sum(keep) >= sampling.top_k)
        logits_V = jnp.where(keys_V >= kth, logits_V, -jnp.inf)
    # The maximum goes first: a compiler that fuses x / T - max(x / T) into one rounding leaves
    # the maximum itself off zero, and at a low temperature far enough off to overflow exp.
    weights_V = jnp.exp((logits_V - jnp.max(logits_V)) / sampling.temperature)
    probs_V = weights_V / jnp.sum(weights_V)
    if sampling.top_p < 1:
        keys_V = _ordered_bits(probs_V)

        def reaches(keep):
            return jnp.sum(jnp.where(keep, probs_V, 0.0)) >= sampling.top_p

        cut = _largest_threshold(keys_V, reaches)
        probs_V = jnp.where(keys_V >= cut, probs_V, 0.0)
        probs_V = probs_V / jnp.sum(probs_V)
    return probs_V


def categorical(uniform, probs_V):
    """The token at which the cumulative mass passes `uniform` in [0, 1); int32.

    Inverse transform in two levels (blocks, then inside one block): one random number a draw and no
    V-long prefix sum. Never returns a token of probability zero.
    """
    V = probs_V.shape[-1]
    width = 1 << max(1, math.ceil(math.log2(max(V, 2)) / 2))
    blocks = -(-V // width)
    table = jnp.pad(probs_V, (0, blocks * width - V)).reshape(blocks, width)

    def pick(target, mass):
        cumulative = jnp.cumsum(mass)
        passed = (cumulative > target) & (mass > 0)
        # Rounding can leave the target at the very end: then the last entry with mass is meant.
        positive = jnp.max(jnp.where(mass > 0, jnp.arange(mass.shape[0]), -1))
        index = jnp.where(jnp.any(passed), jnp.argmax(passed), jnp.maximum(positive, 0))
        return index, target - (cumulative[index] - mass[index])

    block, rest = pick(uniform * jnp.sum(table), jnp.sum(table, axis=1))
    inside, _ = pick(rest, table[block])
    return (block * width + inside).astype(jnp.int32)


def draw(key, logits_V, sampling: Sampling):
    """One token from the filtered distribution (argmax when greedy; the key is then unused)."""
    if sampling.greedy:
        return argmax(logits_V)
    return categorical(jax.random.uniform(key), filtered_probs(logits_V, sampling))
