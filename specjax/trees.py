"""Draft trees: their shape (static or built per round), ancestor masks, and the struct itself.

A tree has T rows. Row 0 is the root, the newest committed token; rows 1.. are drafted. Parents
come before children. A node's position is cache length + its depth, never its row.
"""

import dataclasses
import functools
import heapq
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class DraftTree:
    """One round's draft; fields are batched with a leading B except inside per-row code."""

    tokens_T: jax.Array  # int32; slot 0 is the root
    parent_T: jax.Array  # int32; -1 for the root, parent[i] < i
    child_TxC: jax.Array  # int32; children in draw order, -1 padded
    depth_T: jax.Array  # int32; 0 for the root
    valid_T: jax.Array  # bool; ancestor-closed, the root always valid
    # log-probabilities of the law that drew each node's children, where a rule needs them
    law_TxV: jax.Array | None = None
    # int32: the drafter's most probable first tokens, best first, where it was asked for them
    expected_K: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Topology:
    """A tree shape known at compile time: `parents[i]` is the parent row of row i."""

    parents: tuple[int, ...]

    def __post_init__(self):
        if not self.parents or self.parents[0] != -1:
            raise ValueError("parents: the first entry is the root and must be -1")
        for i, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < i:
                raise ValueError(f"parents[{i}] = {parent} must be an earlier row")

    @property
    def nodes(self) -> int:
        """T: rows of the tree, root included."""
        return len(self.parents)

    @functools.cached_property
    def depth_T(self) -> np.ndarray:
        """Depth of each row."""
        depth = np.zeros(self.nodes, np.int32)
        for i, parent in enumerate(self.parents[1:], start=1):
            depth[i] = depth[parent] + 1
        return depth

    @property
    def max_depth(self) -> int:
        """Most tokens one round can accept."""
        return int(self.depth_T.max())

    @functools.cached_property
    def child_TxC(self) -> np.ndarray:
        """Children of each row in row order, -1 padded (C at least 1)."""
        children = [[] for _ in self.parents]
        for i, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(i)
        width = max(1, *(len(c) for c in children))
        return np.array([c + [-1] * (width - len(c)) for c in children], np.int32)

    @functools.cached_property
    def rank_T(self) -> np.ndarray:
        """Place of each row among its siblings, 0 for the root."""
        rank = np.zeros(self.nodes, np.int32)
        for siblings in self.child_TxC:
            here = siblings[siblings >= 0]
            rank[here] = np.arange(len(here))
        return rank

    @functools.cached_property
    def visible_TxT(self) -> np.ndarray:
        """visible[i, j]: row i attends to row j (its ancestors and itself)."""
        visible = np.eye(self.nodes, dtype=bool)
        for i, parent in enumerate(self.parents[1:], start=1):
            visible[i] |= visible[parent]
        return visible

    @property
    def only_last_moves(self) -> bool:
        """Whether every accepted path but its last node already lies in slot order.

        True for chains and backbone trees (backbone rows come first): committing then moves one
        row of the cache instead of a whole path.
        """
        return all(p == self.depth_T[p] for p in self.parents[1:])

    def draft(self, tokens_BxT, law_BxTxV=None) -> DraftTree:
        """A batched DraftTree of this shape, all rows valid."""
        B = tokens_BxT.shape[0]
        repeat = lambda x: jnp.broadcast_to(jnp.asarray(x), (B, *np.shape(x)))  # noqa: E731
        return DraftTree(
            tokens_BxT,
            repeat(np.array(self.parents, np.int32)),
            repeat(self.child_TxC),
            repeat(self.depth_T),
            repeat(np.ones(self.nodes, bool)),
            law_BxTxV,
        )


def chain(depth: int) -> Topology:
    """root -> 1 -> 2 -> ... -> depth; depth 0 is the root alone."""
    if depth < 0:
        raise ValueError(f"chain: depth {depth} must be at least 0")
    return Topology(tuple(range(-1, depth)))


def chains(count: int, depth: int) -> Topology:
    """`count` chains of `depth` nodes below one root, chain by chain."""
    if count < 1 or depth < 1:
        raise ValueError(f"chains: count {count} and depth {depth} must be at least 1")
    starts = [1 + j * depth for j in range(count)]
    return Topology((-1, *(0 if i == s else i - 1 for s in starts for i in range(s, s + depth))))


def branching(counts) -> Topology:
    """Every node of level i - 1 has counts[i - 1] children; rows level by level, siblings together.

    Raises:
      ValueError: no level, or a level without children.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"branching: {tuple(counts)} must hold one count >= 1 for each level")
    return paths(itertools.product(*map(range, counts)))


def backbone(depth: int, candidates: int) -> Topology:
    """FastEagle's constrained tree (backbone expansion): every level hangs on the backbone.

    Rows 1..depth are the backbone, each level's most probable token; the other candidates - 1
    tokens of level i follow as leaves, level by level, in rank order. T = depth*candidates + 1.
    """
    if depth < 1 or candidates < 1:
        raise ValueError(f"backbone: depth {depth} and candidates {candidates} must be at least 1")
    leaves = [level for level in range(depth) for _ in range(candidates - 1)]
    return Topology(tuple(range(-1, depth)) + tuple(leaves))


def rank_paths(static_paths) -> tuple[tuple[int, ...], ...]:
    """The nodes of the tree that rank paths describe, prefixes included, in order of their rows.

    Entry i is the path of row i + 1, by depth, then rank path: equal trees are equal values.

    Raises:
      ValueError: no path at all, or a rank that is not a whole number >= 0.
    """
    static_paths = [tuple(path) for path in static_paths]
    if not any(static_paths):
        raise ValueError("paths: no path is given")
    for path in static_paths:
        if not all(isinstance(rank, int) and rank >= 0 for rank in path):
            raise ValueError(f"paths: {path} must hold ranks, whole numbers from 0")
    nodes = {p[:i] for p in static_paths for i in range(1, len(p) + 1)}
    return tuple(sorted(nodes, key=lambda p: (len(p), p)))


def paths(static_paths) -> Topology:
    """A tree from rank paths, e.g. [(0,), (1,), (0, 0)]: each is a node, and so are its prefixes.

    Rows are ordered as in `rank_paths`, which raises the same errors.
    """
    order = ((), *rank_paths(static_paths))
    row = {p: i for i, p in enumerate(order)}
    return Topology(tuple(-1 if not p else row[p[:-1]] for p in order))


def best_first(acceptance, nodes: int) -> tuple[tuple[int, ...], ...]:
    """Rank paths of the tree of `nodes` drafted nodes that expects the longest acceptance.

    `acceptance[i][r]` is the probability that the candidate of rank r at depth i + 1 is right,
    given that everything before it was. A node is accepted with the product along its path, and
    the expected length is the sum over nodes. Products only shrink along a path, so the largest
    `nodes` of them form a tree, and no other tree expects more. Ties go to the shallower, then
    earlier path.

    Raises:
      ValueError: a number that is no probability, or fewer paths than `nodes`.
    """
    levels = [tuple(map(float, level)) for level in acceptance]
    if not all(0 <= chance <= 1 for level in levels for chance in level):
        raise ValueError(f"acceptance: {levels} must hold probabilities")
    if nodes < 1:
        raise ValueError(f"nodes: {nodes} must be at least 1")
    kept, frontier = [], [(-1.0, 0, ())]  # the root, which is not drafted
    while len(kept) <= nodes:
        if not frontier:
            raise ValueError(f"nodes: {nodes} drafted nodes, but acceptance has {len(kept) - 1}")
        product, depth, path = heapq.heappop(frontier)
        kept.append(path)
        for rank, chance in enumerate(levels[depth] if depth < len(levels) else ()):
            heapq.heappush(frontier, (product * chance, depth + 1, (*path, rank)))
    return rank_paths(kept)


def visible_from_parents(parent_T, max_depth: int):
    """Ancestor-or-self mask TxT of a tree built on the device (pointer doubling)."""
    T = parent_T.shape[0]
    reach_TxT = (parent_T[:, None] == jnp.arange(T)) | jnp.eye(T, dtype=bool)
    hops = 1
    while hops < max_depth:
        reach_TxT = (reach_TxT.astype(jnp.float32) @ reach_TxT.astype(jnp.float32)) > 0
        hops *= 2
    return reach_TxT


def children_from_parents(parent_T, width: int):
    """child_TxC of a tree built on the device: children in row order, -1 padded."""
    T = parent_T.shape[0]
    is_child_TxT = parent_T[None, :] == jnp.arange(T)[:, None]
    rank_TxT = jnp.cumsum(is_child_TxT, axis=1) - 1
    rows = jnp.arange(T, dtype=jnp.int32)
    slots = [
        jnp.max(jnp.where(is_child_TxT & (rank_TxT == c), rows, -1), axis=1) for c in range(width)
    ]
    return jnp.stack(slots, axis=1)


def tree_of(root_B, token_BxM, parent_BxM, depth: int, width: int) -> DraftTree:
    """A DraftTree from drafted rows 1.. in topological order, at most `width` children a node."""
    B, M = token_BxM.shape
    tokens_BxT = jnp.concatenate([root_B[:, None], token_BxM], axis=1)
    parent_BxT = jnp.concatenate([jnp.full((B, 1), -1, jnp.int32), parent_BxM], axis=1)
    # Depth by walking up: after d steps a node of depth d stands at the root's parent.
    depth_BxT, at = jnp.zeros((B, M + 1), jnp.int32), parent_BxT
    for _ in range(depth):
        depth_BxT = depth_BxT + (at >= 0)
        at = jnp.where(at >= 0, jnp.take_along_axis(parent_BxT, jnp.maximum(at, 0), axis=1), -1)
    child_BxTxC = jax.vmap(lambda p: children_from_parents(p, width))(parent_BxT)
    valid_BxT = jnp.ones((B, M + 1), bool)
    return DraftTree(tokens_BxT, parent_BxT, child_BxTxC, depth_BxT, valid_BxT)


def best_of_pool(root_B, score_BxM, token_BxM, parent_BxM, nodes: int, depth: int, width: int):
    """The tree of the `nodes` - 1 best nodes of a pool, in creation order.

    Args:
      root_B: the root's tokens.
      score_BxM: cumulative log-probabilities: a child never outscores its parent, and ties go to
        the earlier node, so what is kept is closed under ancestors.
      token_BxM, parent_BxM: of each node; parents are places in the pool, -1 the root.
      nodes, depth, width: rows of the tree, its deepest level, most children of a node.
    """
    _, kept = jax.lax.top_k(score_BxM, nodes - 1)
    kept = jnp.sort(kept, axis=1)  # creation order: parents before children
    token = jnp.take_along_axis(token_BxM, kept, axis=1)
    parent = jnp.take_along_axis(parent_BxM, kept, axis=1)
    row_of_parent = jnp.argmax(kept[:, None, :] == parent[..., None], axis=-1) + 1
    parent = jnp.where(parent < 0, 0, row_of_parent)
    return tree_of(root_B, token, parent.astype(jnp.int32), depth, width)
