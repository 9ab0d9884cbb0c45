"""Merging trees against sets of paths."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.drafters.fusion import fuse, trie
from specjax.trees import DraftTree, children_from_parents

DEPTH = 5  # of anything here
T, R, K = 7, 4, 4


def random_tree(rng, alphabet, rows=T) -> DraftTree:
    """Distinct siblings; some rows invalid, with whatever below them."""
    parent, depth, path = [-1], [0], [()]
    while len(parent) < rows:
        p = int(rng.integers(len(parent)))
        new = (*path[p], int(rng.integers(alphabet)))
        if depth[p] < DEPTH and new not in path:
            parent.append(p), depth.append(depth[p] + 1), path.append(new)
    valid = [True]
    for p in parent[1:]:
        valid.append(valid[p] and rng.random() < 0.8)
    tokens = [9] + [p[-1] for p in path[1:]]
    parent = jnp.asarray(parent, jnp.int32)
    return DraftTree(
        jnp.asarray(tokens, jnp.int32), parent, children_from_parents(parent, rows),
        jnp.asarray(depth, jnp.int32), jnp.asarray(valid),
    )  # fmt: skip


def random_finds(rng, alphabet):
    """Continuations of any length up to K, also none at all."""
    found = rng.integers(alphabet, size=(R, K))
    lengths = rng.integers(K + 1, size=R)
    return np.where(np.arange(K) < lengths[:, None], found, -1).astype(np.int32)


def paths(tree: DraftTree) -> list[tuple]:
    """Token paths of the valid rows but the root, in row order."""
    path = [()]
    for i, p in enumerate(tree.parent_T.tolist()[1:], start=1):
        assert 0 <= p < i
        path.append((*path[p], int(tree.tokens_T[i])))
    return [p for p, valid in zip(path, tree.valid_T.tolist(), strict=True) if valid and p]


def prefixes(found) -> collections.Counter:
    """How often each prefix was found, in order of first finding."""
    rows = [[t for t in row if t >= 0] for row in found.tolist()]
    return collections.Counter(tuple(row[: i + 1]) for row in rows for i in range(len(row)))


def check(tree: DraftTree):
    """What every draft must satisfy."""
    path = paths(tree)
    assert len(set(path)) == len(path)
    valid = tree.valid_T.tolist()
    assert valid[0] and tree.parent_T[0] == -1 and tree.depth_T[0] == 0
    for i, p in enumerate(tree.parent_T.tolist()[1:], start=1):
        assert tree.depth_T[i] == tree.depth_T[p] + 1
        assert valid[p] or not valid[i]
    children = [[c for c in row if c >= 0] for row in tree.child_TxC.tolist()]
    for i, row in enumerate(children):
        own = [c for c, p in enumerate(tree.parent_T.tolist()) if p == i and valid[c]]
        assert row == own


fused = jax.jit(
    lambda tree, found, size, nodes: fuse(tree, trie(found, nodes), R, DEPTH, size),
    static_argnums=(2, 3),
)
ALL = T + R * K  # enough rows for everything


@pytest.mark.parametrize("alphabet", [1, 2, 4])
def test_the_fusion_holds_the_paths_of_both(alphabet):
    rng, shared = np.random.default_rng(alphabet), 0
    for _ in range(80):
        tree = random_tree(rng, max(alphabet, 2))
        found = random_finds(rng, alphabet)
        out = fused(tree, found, ALL, 1 + R * K)
        check(out)
        assert set(paths(out)) == set(paths(tree)) | set(prefixes(found))
        assert paths(out)[: len(paths(tree))] == paths(tree)
        shared += len(set(paths(tree)) & set(prefixes(found)))
    assert shared > 20


def test_fusing_with_nothing_or_with_itself_changes_nothing():
    rng = np.random.default_rng(0)
    for _ in range(30):
        tree = random_tree(rng, 3)
        leaves = [p for p in paths(tree) if not any(q[:-1] == p for q in paths(tree))]
        itself = [(*p, *[-1] * (DEPTH - len(p))) for p in leaves]
        itself = np.array(itself + [[-1] * DEPTH] * (T - len(itself)), np.int32)
        nothing = np.full((T, DEPTH), -1, np.int32)
        for found in (itself, nothing):
            out = fused(tree, found, T, 1 + T)
            check(out)
            assert paths(out) == paths(tree)
            assert out.tokens_T[0] == tree.tokens_T[0]


def test_a_trie_keeps_the_most_frequent_prefixes():
    rng = np.random.default_rng(1)
    nothing = jax.tree.map(lambda x: x[:1], random_tree(rng, 2, rows=1))
    for _ in range(80):
        found = random_finds(rng, 2)
        counts = prefixes(found)
        for nodes in (1, 4, 7):
            kept = paths(fused(nothing, found, 1 + nodes, 1 + nodes))
            assert set(kept) == {p for p, _ in counts.most_common(nodes)}  # ties: found first


def test_counts_are_how_often_a_prefix_was_found():
    rng = np.random.default_rng(2)
    counted = jax.jit(functools.partial(trie, size=1 + R * K))
    for _ in range(40):
        found = random_finds(rng, 2)
        rows, path = counted(found), [()]
        for token, parent in zip(
            rows.token_N.tolist()[1:], rows.parent_N.tolist()[1:], strict=True
        ):
            path.append((*path[parent], token))
        weights = rows.weight_N.tolist()
        assert {p: w for p, w in zip(path[1:], weights[1:], strict=True) if w} == prefixes(found)


def test_a_small_budget_goes_to_the_tree_first_and_stays_a_tree():
    rng = np.random.default_rng(3)
    for _ in range(60):
        tree, found = random_tree(rng, 3), random_finds(rng, 3)
        known, counts = paths(tree), prefixes(found)
        for size in (T, T + 3):
            out = fused(tree, found, size, 1 + R * K)
            check(out)
            kept = paths(out)
            assert kept[: len(known)] == known
            added = [p for p in counts if p not in known]
            room = size - 1 - len(known)
            best = sorted((counts[p] for p in added), reverse=True)[:room]
            assert sorted((counts[p] for p in kept[len(known) :]), reverse=True) == best
