"""Trees merged by longest prefix: of rows that spell the same tokens from the root one is kept.

Source: RASD (arXiv 2503.03434), which merges retrieved continuations into a trie and the trie into
the drafter's tree. Both are one operation here, in fixed shape, for one sequence: write all rows
down one after another, let each carry a weight, keep one row a path with the sum of its weights,
and of those the heaviest. A path is never heavier than its prefixes, so what is kept is a tree.
"""

import flax.struct
import jax
import jax.numpy as jnp

from specjax.trees import DraftTree, children_from_parents

CERTAIN = 1 << 20
"""Weight of a row that is kept before all that were counted."""


@flax.struct.dataclass
class Rows:
    """Rows of a tree, the root in row 0, parents before children; weight 0 is no row."""

    token_N: jax.Array  # int32
    parent_N: jax.Array  # int32; the root is its own
    depth_N: jax.Array  # int32
    weight_N: jax.Array  # int32


def same_paths(rows: Rows, depth: int):
    """bool NxN: whether two rows at depths up to `depth` spell the same tokens from the root."""
    root_N = jnp.arange(rows.token_N.shape[0]) == 0
    equal = lambda x_N: x_N[:, None] == x_N  # noqa: E731
    # The last `span` rows of both paths are equal; the root, its own parent, equals itself alone.
    same_NxN, up_N, span = equal(root_N) & (equal(rows.token_N) | root_N), rows.parent_N, 1
    while span < depth:
        same_NxN, up_N, span = same_NxN & same_NxN[up_N][:, up_N], up_N[up_N], 2 * span
    return same_NxN


def merge(rows: Rows, depth: int, size: int) -> Rows:
    """One row a path, the `size` heaviest of them; of equals the ones written first.

    Args:
      rows: depths up to `depth`; no row heavier than its parent once equal paths are summed, except
        where all of the heavier ones fit.
      size: rows of the result, root included.
    """
    same_NxN = same_paths(rows, depth) & (rows.weight_N > 0)
    first_N = jnp.argmax(same_NxN, axis=1).astype(jnp.int32)
    total_N = jnp.sum(jnp.where(same_NxN, rows.weight_N, 0), axis=1)
    return heaviest(rows, first_N, total_N, size)


def heaviest(rows: Rows, first_N, total_N, size: int) -> Rows:
    """`merge`, given the first row that spells each row's path and what all of those weigh."""
    N = rows.token_N.shape[0]
    places_N = jnp.arange(N, dtype=jnp.int32)
    total_N = jnp.where((first_N == places_N) & (rows.weight_N > 0), total_N, 0)
    total_N = jnp.pad(total_N, (0, max(0, size - N)))
    weight_M, kept_M = jax.lax.top_k(total_N, size)
    kept_M = jnp.sort(jnp.where(weight_M > 0, kept_M, N))  # as written: parents before children
    there_M, kept_M = kept_M < N, jnp.minimum(kept_M, N - 1)
    parent_M = jnp.searchsorted(kept_M, first_N[rows.parent_N[kept_M]]).astype(jnp.int32)
    # Places that are left over repeat the last row, without weight, below the root.
    return Rows(
        jnp.where(there_M, rows.token_N[kept_M], 0),
        jnp.where(there_M, parent_M, 0),
        jnp.where(there_M, rows.depth_N[kept_M], 1),
        jnp.where(there_M, total_N[kept_M], 0),
    )


def trie(found_RxK, size: int) -> Rows:
    """Continuations merged by common prefix, each prefix weighing as often as it was found.

    Args:
      found_RxK: tokens; negative from where a continuation ends.
      size: rows to keep, root included: the most frequent, then those of earlier continuations.
    """
    R, K = found_RxK.shape
    step_K = jnp.arange(K, dtype=jnp.int32)
    parent_RxK = jnp.arange(R, dtype=jnp.int32)[:, None] * K + step_K  # row 0 is the root
    parts = (
        found_RxK,
        jnp.where(step_K == 0, 0, parent_RxK),
        jnp.broadcast_to(step_K + 1, (R, K)),
        (found_RxK >= 0).astype(jnp.int32),
    )
    root = (0, 0, 0, CERTAIN)
    flat = lambda r, part: jnp.append(jnp.int32(r), part.reshape(-1))  # noqa: E731
    rows = Rows(*map(flat, root, parts))
    # Equal paths have equal depths: R^2 K comparisons, where rows of any tree take (R K)^2.
    same_RxRxK = (found_RxK[:, None] == found_RxK) & (found_RxK >= 0)
    same_RxRxK = jnp.cumprod(same_RxRxK.astype(jnp.int32), axis=-1)
    first_RxK = jnp.argmax(same_RxRxK, axis=1).astype(jnp.int32)
    first_N = flat(0, 1 + first_RxK * K + step_K)
    return heaviest(rows, first_N, flat(CERTAIN, jnp.sum(same_RxRxK, axis=1)), size)


def fuse(tree: DraftTree, other: Rows, branches: int, depth: int, size: int) -> DraftTree:
    """A tree with all rows of `tree`, then the heaviest paths that `other` adds, T = size.

    Args:
      tree: one sequence's draft; its rows must fit.
      other: a trie below the same root.
      branches: most children a row of `other` has.
      depth: of the deeper one.
      size: T.
    """
    T = tree.tokens_T.shape[0]
    # Rows of `other` but its root come behind: row i of it is row T - 1 + i.
    shifted = jnp.where(other.parent_N > 0, other.parent_N + T - 1, 0)
    joined = lambda ours, theirs: jnp.concatenate([ours, theirs[1:]])  # noqa: E731
    rows = Rows(
        joined(tree.tokens_T, other.token_N),
        joined(jnp.maximum(tree.parent_T, 0), shifted),
        joined(tree.depth_T, other.depth_N),
        joined(jnp.where(tree.valid_T, CERTAIN, 0), other.weight_N),
    )
    merged = merge(rows, depth, size)
    valid_T = merged.weight_N > 0
    parent_T = merged.parent_N.at[0].set(-1)
    width = min(size - 1, tree.child_TxC.shape[1] + branches)
    child_TxC = children_from_parents(jnp.where(valid_T, parent_T, -1), width)
    return DraftTree(merged.token_N, parent_T, child_TxC, merged.depth_N, valid_T)
