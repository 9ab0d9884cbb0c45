"""Tree shapes against walks over the parent array, one node at a time."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.trees import (
    Topology,
    backbone,
    branching,
    chain,
    children_from_parents,
    likeliest,
    paths,
    visible_from_parents,
)


def random_parents(random, nodes):
    """Any parent before its child; biased so that deep and bushy trees both occur."""
    window = random.randint(1, nodes + 1)
    return (-1, *(int(random.randint(max(0, i - window), i)) for i in range(1, nodes)))


def ancestors(parents, i):
    """Row i, its parent, ..., the root."""
    walk = [i]
    while parents[walk[-1]] >= 0:
        walk.append(parents[walk[-1]])
    return walk


RANDOM = np.random.RandomState(0)
TREES = [random_parents(RANDOM, n) for n in (1, 2, 3, 5, 9, 9, 17, 17, 40)]
TREES += [chain(6).parents, backbone(4, 3).parents, (-1, 0, 0, 0, 0)]


@pytest.mark.parametrize("parents", TREES, ids=lambda p: f"{len(p)}rows")
def test_static_properties(parents):
    tree = Topology(parents)
    T = len(parents)
    walks = [ancestors(parents, i) for i in range(T)]
    assert tree.nodes == T
    assert tree.depth_T.tolist() == [len(w) - 1 for w in walks]
    assert tree.max_depth == max(len(w) for w in walks) - 1
    assert tree.visible_TxT.dtype == bool
    assert [np.flatnonzero(row).tolist() for row in tree.visible_TxT] == [sorted(w) for w in walks]
    children = [[c for c in range(T) if parents[c] == i] for i in range(T)]
    assert [[c for c in row if c >= 0] for row in tree.child_TxC] == children
    assert tree.child_TxC.shape == (T, max(1, *map(len, children)))
    for row, kids in zip(tree.child_TxC, children, strict=True):
        assert (row[len(kids) :] == -1).all(), "padding comes last"


def test_trees_built_on_the_device_equal_static_ones():
    T, width = 9, 8
    random = np.random.RandomState(1)
    batch = [random_parents(random, T) for _ in range(30)] + [chain(T - 1).parents]
    parents = jnp.array(batch, jnp.int32)
    trees = [Topology(p) for p in batch]
    visible = jax.jit(jax.vmap(lambda p: visible_from_parents(p, T - 1)))(parents)
    np.testing.assert_array_equal(visible, [t.visible_TxT for t in trees])
    children = jax.jit(jax.vmap(lambda p: children_from_parents(p, width)))(parents)
    assert children.dtype == jnp.int32
    for row, tree in zip(children, trees, strict=True):
        C = tree.child_TxC.shape[1]
        np.testing.assert_array_equal(row[:, :C], tree.child_TxC)
        assert (np.asarray(row)[:, C:] == -1).all()


def test_ancestors_need_no_more_hops_than_the_depth():
    reach = jax.jit(visible_from_parents, static_argnums=1)
    for depth in (1, 2, 3, 5, 8):
        visible = reach(jnp.array(chain(depth).parents), depth)
        np.testing.assert_array_equal(visible, np.tri(depth + 1, dtype=bool))


def test_chain():
    assert chain(3).parents == (-1, 0, 1, 2)
    assert chain(0).parents == (-1,) and chain(0).max_depth == 0
    assert chain(0).child_TxC.tolist() == [[-1]]


@pytest.mark.parametrize("N, C", [(1, 1), (1, 4), (3, 1), (3, 2), (6, 10), (7, 8)])
def test_backbone_ids(N, C):
    """Row numbers, parents, depths and visibility as the reference's formulas have them."""
    tree = backbone(N, C)
    assert tree.nodes == N * C + 1 and tree.max_depth == N
    row = {(i, 1): i for i in range(1, N + 1)}
    row |= {(i, j): N + (i - 1) * (C - 1) + j - 1 for i in range(1, N + 1) for j in range(2, C + 1)}
    assert sorted(row.values()) == list(range(1, tree.nodes))
    for (i, j), node in row.items():
        assert tree.parents[node] == (0 if i == 1 else row[i - 1, 1])
        assert tree.depth_T[node] == i
        assert tree.child_TxC[tree.parents[node]][j - 1] == node, "children in rank order"
        seen = {0, *(row[level, 1] for level in range(1, i)), node}
        assert set(np.flatnonzero(tree.visible_TxT[node])) == seen
    leaves = (tree.child_TxC < 0).all(axis=1).sum()
    assert leaves == (N - 1) * (C - 1) + C
    assert tree.only_last_moves


def test_backbone_expected_length():
    """Expected tokens of a round by walking the tree equal 1 + sum_i prod_{j<i} a_j c_i."""
    random = np.random.RandomState(2)
    for N, C in ((1, 1), (4, 1), (5, 3)):
        tree = backbone(N, C)
        # p[i, j]: the target's token at depth i + 1 is the rank-j candidate.
        p = random.dirichlet(np.ones(C + 1), N)[:, :C]

        def walk(node, tree=tree, p=p):
            chances = p[tree.depth_T[node]] if tree.depth_T[node] < len(p) else []
            kids = tree.child_TxC[node]
            return 1 + sum(q * walk(kid) for q, kid in zip(chances, kids, strict=False) if kid >= 0)

        reach = np.cumprod([1, *p[:-1, 0]])  # the backbone was right so far
        assert walk(0) == pytest.approx(1 + np.sum(reach * p.sum(axis=1)))


def test_paths():
    tree = paths([(0,), (1,), (0, 0), (2, 1, 0)])
    # Prefixes are added: (2,) and (2, 1). Order: by depth, then rank path.
    assert tree.parents == (-1, 0, 0, 0, 1, 3, 5)
    assert paths([(0, 0, 0)]).parents == chain(3).parents
    assert paths(reversed([(0,), (1,), (0, 0), (2, 1, 0)])).parents == tree.parents
    assert paths([(0,), (0,), (0, 1)]) == paths([[0], [0, 1]])
    full = paths(list(itertools.product(range(2), repeat=3)))
    assert full.nodes == 15 and full.child_TxC[:7].tolist() == [
        [2 * i + 1, 2 * i + 2] for i in range(7)
    ]


@pytest.mark.parametrize("counts", [(1,), (3,), (2, 2), (3, 1, 2)])
def test_branching_gives_every_node_of_a_level_as_many_children(counts):
    tree, start, width = branching(counts), 0, 1
    for count in counts:
        below = start + width
        children = tree.child_TxC[start:below, :count]
        np.testing.assert_array_equal(children.ravel(), below + np.arange(width * count))
        start, width = below, width * count
    assert tree.nodes == start + width and tree.max_depth == len(counts)


@pytest.mark.parametrize("probs", [(0.5, 0.25, 0.125), (0.7, 0.2), (0.4, 0.4, 0.1), (0.3,)])
def test_likeliest_expects_more_accepted_tokens_than_any_other_tree(probs):
    """Against all trees of few nodes, grown node by node in every way."""
    value = lambda path: np.prod([probs[rank] for rank in path])  # noqa: E731
    best, grown = {}, {frozenset([()])}
    for count in range(1, 6):
        grown = {
            tree | {(*path, rank)}
            for tree in grown
            for path in tree
            for rank in range(len(probs))
            if (*path, rank) not in tree
        }
        best[count] = max(sum(map(value, tree)) - 1 for tree in grown)
    for count in best:
        tree = likeliest(count, probs)
        assert tree.nodes == count + 1
        reach = np.ones(tree.nodes)
        for row, children in enumerate(tree.child_TxC):
            for rank, child in enumerate(children[children >= 0]):
                reach[child] = reach[row] * probs[rank]
        assert reach[1:].sum() == pytest.approx(best[count])


def test_likeliest_breaks_ties_by_depth_then_rank():
    halves = [0.5 ** (rank + 1) for rank in range(8)]
    # Values 1/2; 1/4, 1/4; then of (2,), (0, 1), (1, 0), (0, 0, 0), all 1/8, the first two.
    assert likeliest(5, halves) == paths([(0,), (1,), (0, 0), (2,), (0, 1)])
    assert likeliest(7, halves).max_depth == 3
    assert likeliest(4, [0.9]) == chain(4)
    assert likeliest(3, [1e-3] * 3) == branching((3,))


def test_only_last_moves_is_what_it_says():
    """True exactly when, on every root-to-node path, all but the last row equal their depth."""
    random = np.random.RandomState(3)
    trees = [random_parents(random, random.randint(1, 7)) for _ in range(300)]
    trees += [chain(5).parents, backbone(3, 3).parents]
    seen = set()
    for parents in trees:
        tree = Topology(parents)
        in_place = all(
            node == depth
            for i in range(len(parents))
            for depth, node in enumerate(ancestors(parents, i)[::-1][:-1])
        )
        assert tree.only_last_moves == in_place
        seen.add(in_place)
    assert seen == {True, False}


def test_topologies_are_hashable_values():
    assert chain(2) == Topology((-1, 0, 1)) == backbone(2, 1)
    assert hash(chain(2)) == hash(backbone(2, 1)) and chain(2) != chain(3)


def test_draft_is_batched():
    tree = backbone(2, 3)
    tokens = jnp.arange(3 * tree.nodes).reshape(3, tree.nodes)
    draft = tree.draft(tokens)
    assert draft.law_TxV is None and draft.tokens_T is tokens
    for b in range(3):
        np.testing.assert_array_equal(draft.parent_T[b], tree.parents)
        np.testing.assert_array_equal(draft.child_TxC[b], tree.child_TxC)
        np.testing.assert_array_equal(draft.depth_T[b], tree.depth_T)
        assert draft.valid_T[b].all()
    law = jnp.zeros((3, tree.nodes, 5))
    assert jax.jit(functools.partial(tree.draft, law_BxTxV=law))(tokens).law_TxV.shape == law.shape


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Topology(()), "parents"),
        (lambda: Topology((0,)), "parents.*root"),
        (lambda: Topology((-1, -1)), r"parents\[1\] = -1"),
        (lambda: Topology((-1, 1)), r"parents\[1\] = 1"),
        (lambda: Topology((-1, 0, 3, 1)), r"parents\[2\] = 3"),
        (lambda: backbone(0, 2), "depth 0"),
        (lambda: backbone(2, 0), "candidates 0"),
        (lambda: chain(-1), "depth -1"),
        (lambda: branching(()), "count"),
        (lambda: branching((2, 0)), r"\(2, 0\)"),
        (lambda: paths([]), "no path"),
        (lambda: paths([(0, -1)]), r"\(0, -1\)"),
        (lambda: likeliest(0, [0.5]), "count 0"),
        (lambda: likeliest(2, [1.0, 0.5]), "rank_probs"),
        (lambda: likeliest(2, [0.25, 0.5]), "rank_probs"),
        (lambda: likeliest(2, [0.5, 0.0]), "rank_probs"),
        (lambda: likeliest(2, []), "rank_probs"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
