"""The key/value cache: fixed slots, explicit per-row lengths, slots past the length are scratch.

Row b holds its committed tokens' keys and values in slots 0..lengths_B[b]-1. A forward over T new
rows writes slots lengths..lengths+T without advancing the length; `compact` then moves the rows
that verification accepted to the front of that scratch region and advances it.
"""

import flax.struct
import jax
import jax.numpy as jnp

from specjax.models.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """One pair of arrays per layer (a tuple), or stacked with a leading L axis when scanning."""

    k: tuple[jax.Array, ...] | jax.Array  # L of BxGxSxK
    v: tuple[jax.Array, ...] | jax.Array
    lengths_B: jax.Array  # int32, committed slots of each row

    @property
    def slots(self) -> int:
        """S, the number of slots of a row."""
        return jax.tree.leaves(self.k)[0].shape[-2]


def empty_cache(
    config: ModelConfig, batch: int, slots: int, dtype=jnp.float32, layers=None, stacked=False
) -> KVCache:
    """An all-zero cache for `layers` layers (default: the config's)."""
    layers = config.num_layers if layers is None else layers
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    if stacked:
        k, v = jnp.zeros((layers, *shape), dtype), jnp.zeros((layers, *shape), dtype)
    else:
        k = tuple(jnp.zeros(shape, dtype) for _ in range(layers))
        v = tuple(jnp.zeros(shape, dtype) for _ in range(layers))
    return KVCache(k, v, jnp.zeros(batch, jnp.int32))


def causal_cache_mask(lengths_B, T: int, S: int):
    """BxTxS: new row t sees every slot up to its own, lengths + t."""
    return jnp.arange(S) <= (lengths_B[:, None] + jnp.arange(T))[..., None]


def tree_cache_mask(lengths_B, visible_TxT, S: int):
    """BxTxS: committed slots, and among the T new slots the pairs of `visible` (TxT or BxTxT)."""
    T = visible_TxT.shape[-1]
    visible_BxTxT = jnp.broadcast_to(visible_TxT, (lengths_B.shape[0], T, T))

    def row(length, visible):
        committed = jnp.broadcast_to(jnp.arange(S) < length, (T, S))
        return jax.lax.dynamic_update_slice(committed, visible, (0, length))

    return jax.vmap(row)(lengths_B, visible_BxTxT)


def _move(array, source_BxA, start_B):
    """array[b, :, start_b + j] = array[b, :, source_bj], reading everything before writing."""
    axis = array.ndim - 2
    B, A = source_BxA.shape
    batch_axis = array.ndim - 4
    if B == 1 and A == 1:
        row = jax.lax.dynamic_slice_in_dim(array, source_BxA[0, 0], 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(array, row, start_B[0], axis)

    def move(one, source_A, start):
        rows = jnp.take(one, source_A, axis=axis - 1, mode="clip")
        return jax.lax.dynamic_update_slice_in_dim(one, rows, start, axis - 1)

    return jax.vmap(move, (batch_axis, 0, 0), batch_axis)(array, source_BxA, start_B)


def compact(cache: KVCache, node_BxA, first: int | jax.Array, count_B) -> KVCache:
    """Commits `count_B` of the freshly written rows.

    Args:
      cache: rows of this round lie at slots lengths..lengths+T.
      node_BxA: which fresh row goes to slot lengths + first + j, for j < A. Entries that must not
        move name their own place (first + j); surplus entries may hold anything in range, they
        land past the new length.
      first: offset of the first destination; an int, or one int32 per row.
      count_B: rows to commit, int32; 0 leaves a row's length as it was.
    """
    start_B = cache.lengths_B + first
    source_BxA = cache.lengths_B[:, None] + node_BxA
    move = lambda array: _move(array, source_BxA, start_B)  # noqa: E731
    return cache.replace(
        k=jax.tree.map(move, cache.k),
        v=jax.tree.map(move, cache.v),
        lengths_B=cache.lengths_B + count_B,
    )
