"""Exactness by enumeration: every draft with its probability, every emission completed by p.

A drafting law and a rule's law together give a law over emitted prefixes; extended by the target
to one common length it must be the target's own joint. Nothing here comes from the fast paths.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import laws
import numpy as np

from specjax.trees import DraftTree, Topology
from specjax.verification import law

MOST_DRAFTS = 7_000


# ---- drawing siblings ----------------------------------------------------------------------------


def sibling_draws(q_V, count: int, kind: str):
    """[(tokens in draw order, probability)] of `count` siblings.

    with_replacement (chains too): independent draws. without_replacement: one after another, then
    uniformly from what is left once q is used up. top: the best, for certain.
    """
    if kind == "top":
        return [(tuple(np.argsort(-q_V, kind="stable")[:count].tolist()), 1.0)]
    if kind == "without_replacement":
        return list(_without_replacement(q_V, count, ()))
    every = itertools.product(np.flatnonzero(q_V).tolist(), repeat=count)
    return [(tokens, float(np.prod(q_V[list(tokens)]))) for tokens in every]


def _without_replacement(q_V, count, drawn):
    if count == 0:
        yield drawn, 1.0
        return
    if q_V.sum() == 0:
        q_V = np.array([float(x not in drawn) for x in range(len(q_V))])
    q_V = q_V / q_V.sum()
    for x in np.flatnonzero(q_V).tolist():
        left_V = q_V.copy()
        left_V[x] = 0
        for tokens, weight in _without_replacement(left_V, count - 1, (*drawn, x)):
            yield tokens, q_V[x] * weight


# ---- whole drafts --------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A tree shape, how its tokens are drawn, and conditional tables p and q by prefix."""

    topology: Topology
    vocab: int
    kind: str
    p: dict
    q: dict
    valid: np.ndarray | None = None  # bool_T; None: all rows
    recorded: dict | None = None  # what the tree claims to have been drawn from; None: q

    def prefixes(self, tokens) -> list[tuple[int, ...]]:
        """The tokens on the way to each row."""
        parents = self.topology.parents
        return [laws.node_path(parents, tokens, v) for v in range(len(parents))]

    def draft(self, tokens) -> tuple[DraftTree, np.ndarray]:
        """(tree, log p_TxV) of one outcome of drafting, as NumPy."""
        top, prefixes, anything = self.topology, self.prefixes(tokens), np.full(self.vocab, 1.0)
        recorded = self.q if self.recorded is None else self.recorded
        with np.errstate(divide="ignore"):
            logp_TxV = np.log([self.p[x] for x in prefixes])
            logq_TxV = np.log([recorded.get(x, anything) for x in prefixes])
        valid_T = np.ones(top.nodes, bool) if self.valid is None else self.valid
        sampled = self.kind != "top" or self.recorded is not None
        return DraftTree(
            np.array(tokens), np.array(top.parents), top.child_TxC, top.depth_T, valid_T,
            logq_TxV if sampled else None,
        ), logp_TxV  # fmt: skip


def random_case(rng, topology, vocab, kind, zeros=0.3, valid=None) -> Case:
    """Fresh random tables, about a third of their entries zero."""
    p, q = (laws.random_table(rng, vocab, topology.max_depth + 1, zeros) for _ in range(2))
    return Case(topology, vocab, kind, p, q, valid)


def size(topology, vocab) -> int:
    """No drawing has more outcomes than this."""
    return vocab ** (topology.nodes - 1)


def drafts(case: Case, draw=sibling_draws):
    """Every outcome of drafting: (tree, log p_TxV, probability)."""
    children = [[c for c in row if c >= 0] for row in case.topology.child_TxC.tolist()]
    draws = functools.cache(lambda prefix, count: draw(case.q[prefix], count, case.kind))

    def grow(row, tokens, weight):
        while row < len(children) and not children[row]:
            row += 1
        if row == len(children):
            yield *case.draft(tokens), weight
            return
        prefix = laws.node_path(case.topology.parents, tokens, row)
        for drawn, probability in draws(prefix, len(children[row])):
            for child, token in zip(children[row], drawn, strict=True):
                tokens[child] = token
            yield from grow(row + 1, list(tokens), weight * probability)

    yield from grow(0, [0] * len(children), 1.0)


def random_draft(rng, case: Case) -> tuple[DraftTree, np.ndarray]:
    """One outcome of drafting, at random: (tree, log p_TxV)."""
    tokens = [0] * case.topology.nodes
    for row, children in enumerate(case.topology.child_TxC):
        children = [c for c in children if c >= 0]
        if children:
            prefix = laws.node_path(case.topology.parents, tokens, row)
            draws = sibling_draws(case.q[prefix], len(children), case.kind)
            weights = np.array([weight for _, weight in draws])
            drawn, _ = draws[rng.choice(len(draws), p=weights / weights.sum())]
            for child, token in zip(children, drawn, strict=True):
                tokens[child] = token
    return case.draft(tokens)


def padded(rng, draft: DraftTree, logp_TxV, rows: int, width: int):
    """The same draft with invalid rows of junk behind it and room for `width` children."""
    T, C = draft.child_TxC.shape
    more, V = rows - T, logp_TxV.shape[1]
    parents = rng.integers(0, T, more)  # junk claims real parents and real tokens
    laws_RxV = np.log(rng.dirichlet(np.ones(V), more)).reshape(more, V)
    wider = ((0, more), (0, width - C))
    grown = DraftTree(
        np.append(draft.tokens_T, rng.integers(0, V, more)),
        np.append(draft.parent_T, parents),
        np.pad(draft.child_TxC, wider, constant_values=-1),
        np.append(draft.depth_T, draft.depth_T[parents] + 1),
        np.append(draft.valid_T, np.zeros(more, bool)),
        None if draft.law_TxV is None else np.concatenate([draft.law_TxV, laws_RxV]),
    )
    return grown, np.concatenate([logp_TxV, laws_RxV])


# ---- the completed law ---------------------------------------------------------------------------


class Proof(NamedTuple):
    """What enumeration found."""

    distance: float  # total variation between the completed law and the target's joint
    accepted: float  # expected drafted tokens accepted
    drafts: int


def completed(p, vocab, length, emissions):
    """The law of `length` tokens when p continues every emission.

    `emissions`: (tokens on the way to each row, weight, stop_T, next_TxV) of each draft.
    """
    mass, joint = {}, np.zeros((vocab,) * length)
    for prefixes, weight, stop_T, next_TxV in emissions:
        for v in np.flatnonzero(stop_T):
            prefix = prefixes[v]
            mass[prefix] = mass.get(prefix, 0) + weight * stop_T[v] * next_TxV[v]
    for prefix, mass_V in mass.items():
        for token in np.flatnonzero(mass_V):
            emitted = (*prefix, int(token))
            joint[emitted] += mass_V[token] * laws.joint(p, vocab, length, emitted)
    return joint


def prove(case: Case, rule=None, emit=None, draw=sibling_draws) -> Proof:
    """Enumerates `case` under a rule, or under emit(draft, log p_TxV) -> (stop_T, next_TxV)."""
    emit = emit or (lambda draft, logp_TxV: law(draft, logp_TxV, rule))
    found = [0.0, 0.0, 0]  # probability, expected acceptance, drafts

    def emissions():
        for draft, logp_TxV, weight in drafts(case, draw):
            stop_T, next_TxV = emit(draft, logp_TxV)
            found[0] += weight
            found[1] += weight * float(stop_T @ case.topology.depth_T)
            found[2] += 1
            yield case.prefixes(draft.tokens_T), weight, stop_T, next_TxV

    length = case.topology.max_depth + 1
    joint = completed(case.p, case.vocab, length, emissions())
    assert abs(found[0] - 1) < 1e-12, "the drafts' probabilities do not sum to 1"
    target = laws.joint(case.p, case.vocab, length)
    return Proof(laws.total_variation(joint, target), *found[1:])


def distance(case: Case, rule=None, **options) -> float:
    """`prove`'s distance."""
    return prove(case, rule, **options).distance
