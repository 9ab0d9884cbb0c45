"""Trees whose depths share one law each: best tokens by rank, and every node's children its own."""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from toys import toy_target

from specjax.drafters.parallel import ParallelDrafter
from specjax.drafters.proposals import Proposal
from specjax.sampling import Sampling
from specjax.trees import Topology, backbone, chains, paths

V, N, KEYS = 5, 3, 12_000
BUSHY = paths([(0, 0, 0), (0, 1), (1, 0), (1, 1), (2, 0, 0), (2, 0, 1)])
SAMPLING = Sampling(0.9)


@dataclasses.dataclass(frozen=True)
class Given(ParallelDrafter):
    """Reads its logits out of the hidden states themselves."""

    name: ClassVar[str] = "given"
    shape: Topology = BUSHY

    @property
    def topology(self):
        return self.shape

    @property
    def depth(self):
        return self.shape.max_depth

    def logits(self, params, target_params, hidden_BxNxD):
        return hidden_BxNxD


def drawn(shape, kind, seed=0):
    """(logits NxV, tree of KEYS rows that all have them)."""
    target = toy_target(vocab_size=V)
    definition = Given(target.config, shape=shape, proposal=Proposal(kind, SAMPLING))
    logits = np.random.default_rng(seed).normal(size=(N, V)).astype(np.float32)

    @jax.jit
    def run(keys):
        rows = jnp.broadcast_to(logits, (KEYS, N, V))
        return definition.draw_tree({}, target.params, rows, jnp.zeros(KEYS, jnp.int32), keys)

    return logits, jax.device_get(run(jax.random.split(jax.random.key(seed), KEYS)))


def successive(law, count, replacement):
    """{tokens: probability} of `count` draws from one law."""
    out = {}
    for tokens in itertools.product(range(V), repeat=count):
        left, chance = law.copy(), 1.0
        for token in tokens:
            chance *= left[token] / left.sum()
            if not replacement:
                left[token] = 0
        if chance > 0:
            out[tokens] = chance
    return out


def cells(columns):
    seen, counts = np.unique(columns, axis=0, return_counts=True)
    return {tuple(x): int(n) for x, n in zip(seen.tolist(), counts, strict=True)}


@pytest.mark.parametrize("kind", ["without_replacement", "with_replacement"])
@pytest.mark.parametrize("shape", [BUSHY, backbone(N, 2)], ids=["bushy", "backbone"])
def test_children_are_drawn_from_their_depth_s_law_and_apart_from_other_nodes(shape, kind):
    logits, tree = drawn(shape, kind)
    law_NxV = np.stack([laws.filtered(row, SAMPLING) for row in logits])
    for row, depth in enumerate(shape.depth_T):
        found = np.exp(tree.law_TxV[:, row])
        expected = np.broadcast_to(law_NxV[min(depth, N - 1)], found.shape)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    families = [[c for c in row if c >= 0] for row in shape.child_TxC]
    families = [f for f in families if f]
    tables = [
        successive(law_NxV[shape.depth_T[f[0]] - 1], len(f), kind == "with_replacement")
        for f in families
    ]
    tests = 0
    for (one, p), (two, q) in itertools.combinations(zip(families, tables, strict=True), 2):
        one, p = one[:2], project(p, 2)
        two, q = two[:2], project(q, 2)
        expected = {(*x, *y): a * b for (x, a), (y, b) in itertools.product(p.items(), q.items())}
        observed = cells(tree.tokens_T[:, one + two])
        assert laws.chi_square(observed, expected) > 1e-5, (one, two)
        tests += 1
    assert tests >= 3


def project(law, width):
    """Marginal law of the first `width` tokens."""
    out = {}
    for tokens, chance in law.items():
        out[tokens[:width]] = out.get(tokens[:width], 0.0) + chance
    return out


def test_chains_are_independent():
    shape = chains(2, N)
    logits, tree = drawn(shape, "chains")
    law_NxV = np.stack([laws.filtered(row, SAMPLING) for row in logits])
    for one, two in itertools.combinations(range(1, shape.nodes), 2):
        p, q = (law_NxV[shape.depth_T[row] - 1] for row in (one, two))
        expected = {(x, y): p[x] * q[y] for x in range(V) for y in range(V)}
        assert laws.chi_square(cells(tree.tokens_T[:, [one, two]]), expected) > 1e-5


def test_best_tokens_depend_on_depth_and_rank_alone():
    logits, tree = drawn(BUSHY, "top")
    order = np.argsort(-logits, axis=1)
    for row in range(1, BUSHY.nodes):
        siblings = [c for c in range(1, BUSHY.nodes) if BUSHY.parents[c] == BUSHY.parents[row]]
        expected = order[BUSHY.depth_T[row] - 1, siblings.index(row)]
        assert (tree.tokens_T[:, row] == expected).all()
    assert tree.law_TxV is None
