"""Negative controls: each known way of getting a rule wrong is caught by the proof that passes it.

Every test proves a rule on random tables and, on the same tables, one bug away from it: the rule
must be within 1e-12 of the target's law and the bug more than 1e-3 off on some table.
"""

import itertools

import laws
import numpy as np
import proofs
import pytest
import slow_rules

from specjax.trees import backbone, chain, chains, paths
from specjax.verification import get_rule, law

RRS = get_rule("recursive_rejection")
RRS_REPLACED = get_rule("recursive_rejection", replacement=True)


def cases(topology, vocab, kind, zeros=0.0, count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [proofs.random_case(rng, topology, vocab, kind, zeros) for _ in range(count)]


def caught(twins, planted):
    """Whether all distances of the correct rule vanish and some of the planted bug's do not."""
    assert max(twins) <= 1e-12
    return max(planted) > 1e-3


# ---- the slow rules agree with the library -------------------------------------------------------


@pytest.mark.parametrize(
    "name, slow, options",
    [
        ("token", slow_rules.token, {}),
        ("block", slow_rules.block, {}),
        ("recursive_rejection", slow_rules.recursive, {}),
        ("recursive_rejection", slow_rules.recursive, {"replacement": True}),
        ("traversal", slow_rules.traversal, {}),
        ("traversal", slow_rules.traversal, {"replacement": True}),
    ],
)
def test_slow_rules_and_library_laws_agree_on_every_draft(name, slow, options):
    rule = get_rule(name, **options)
    shape = chain(3) if rule.chain_only else paths([(0,), (1,), (0, 0), (0, 1), (1, 0)])
    for case in cases(shape, 3, rule.draws, zeros=0.3):
        for draft, logp_TxV, _ in proofs.drafts(case):
            ours, theirs = slow(draft, logp_TxV, **options), law(draft, logp_TxV, rule)
            np.testing.assert_allclose(ours[0], theirs[0], atol=1e-13)
            stopped = ours[0] > 1e-9
            np.testing.assert_allclose(ours[1][stopped], theirs[1][stopped], atol=1e-6)


# ---- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, slow, bug, shape, vocab, zeros",
    [
        ("token", slow_rules.token, "raw_residual", chain(2), 4, 0.0),
        ("block", slow_rules.block, "contiguous", chain(3), 3, 0.0),
        ("block", slow_rules.block, "token_residual", chain(3), 3, 0.0),
        ("recursive_rejection", slow_rules.recursive, "unmasked", backbone(1, 3), 4, 0.0),
        ("recursive_rejection", slow_rules.recursive, "unmasked", backbone(2, 2), 3, 0.0),
        ("recursive_rejection", slow_rules.recursive, "fallback_over_all", backbone(1, 4), 5, 0.6),
        ("traversal", slow_rules.traversal, "divided_by_unseen", backbone(2, 2), 4, 0.0),
        ("traversal", slow_rules.traversal, "divided_by_unseen", chain(2), 4, 0.0),
    ],
)
def test_a_broken_rule_is_caught(name, slow, bug, shape, vocab, zeros):
    rule = get_rule(name)
    switch = {"masked": False} if bug == "unmasked" else {bug: True}
    broken = lambda draft, logp_TxV: slow(draft, logp_TxV, **switch)  # noqa: E731
    tables = cases(shape, vocab, rule.draws, zeros)
    twins = [proofs.distance(c, rule) for c in tables]
    twins += [proofs.distance(c, emit=slow) for c in tables]
    assert caught(twins, [proofs.distance(c, emit=broken) for c in tables])


def test_the_longest_of_independently_verified_chains_is_caught():
    tables = cases(chains(2, 2), 3, "chains")
    longest = lambda draft, logp_TxV: slow_rules.longest_chain(draft, logp_TxV, 2, 2)  # noqa: E731
    twins = [proofs.distance(c, get_rule("k_seq")) for c in tables]
    # One chain is its own longest, and correct.
    alone = lambda draft, logp_TxV: slow_rules.longest_chain(draft, logp_TxV, 1, 2)  # noqa: E731
    twins += [proofs.distance(c, emit=alone) for c in cases(chains(1, 2), 3, "chains")]
    assert caught(twins, [proofs.distance(c, emit=longest) for c in tables])


def test_merging_equal_siblings_drawn_with_replacement_is_caught():
    tables = cases(backbone(1, 3), 3, "with_replacement")

    def merged(draft, logp_TxV):
        tokens = draft.tokens_T.tolist()
        first = [v == 0 or x not in tokens[1:v] for v, x in enumerate(tokens)]
        return law(draft.replace(valid_T=np.array(first)), logp_TxV, RRS_REPLACED)

    twins = [proofs.distance(c, RRS_REPLACED) for c in tables]
    assert caught(twins, [proofs.distance(c, emit=merged) for c in tables])


# ---- drawing -------------------------------------------------------------------------------------


def by_probability(q_V, count, kind):
    """Siblings drawn correctly, then sorted by q."""
    draws = proofs.sibling_draws(q_V, count, kind)
    return [(tuple(sorted(tokens, key=lambda x: -q_V[x])), weight) for tokens, weight in draws]


def pruned(q_V, count, kind):
    """One sibling more than asked for, and the least probable one dropped; draw order kept."""
    draws = proofs.sibling_draws(q_V, count + 1, kind)
    drop = lambda tokens: min(tokens, key=lambda x: q_V[x])  # noqa: E731
    return [(tuple(x for x in tokens if x != drop(tokens)), w) for tokens, w in draws]


@pytest.mark.parametrize("draw", [by_probability, pruned])
@pytest.mark.parametrize("name", ["recursive_rejection", "traversal"])
def test_touching_a_sampled_tree_is_caught(name, draw):
    rule, tables = get_rule(name), cases(backbone(2, 2), 3, "without_replacement")
    twins = [proofs.distance(c, rule) for c in tables]
    assert caught(twins, [proofs.distance(c, rule, draw=draw) for c in tables])
    # Matching does not mind: it never looks at q or at the order.
    assert max(proofs.distance(c, get_rule("match"), draw=draw) for c in tables) <= 1e-12


# ---- what the draft says it was drawn from -------------------------------------------------------


def colder(table, temperature=0.7):
    powers = {x: q ** (1 / temperature) for x, q in table.items()}
    return {x: q / q.sum() for x, q in powers.items()}


@pytest.mark.parametrize(
    "name, shape",
    [
        ("token", chain(2)),
        ("block", chain(2)),
        ("recursive_rejection", backbone(2, 2)),
        ("traversal", backbone(2, 2)),
        ("k_seq", chains(2, 2)),
    ],
)
def test_the_law_at_another_temperature_is_caught(name, shape):
    rule = get_rule(name)
    tables = cases(shape, 3, rule.draws)
    twins = [proofs.distance(c, rule) for c in tables]
    for case in tables:
        case.recorded = colder(case.q)
    assert caught(twins, [proofs.distance(c, rule) for c in tables])


@pytest.mark.parametrize(
    "name, shape",
    [
        ("token", chain(2)),
        ("block", chain(2)),
        ("recursive_rejection", backbone(2, 2)),
        ("traversal", backbone(2, 2)),
    ],
)
def test_the_softmax_as_the_law_of_a_deterministic_tree_is_caught(name, shape):
    rule, tables = get_rule(name), cases(shape, 3, "top")
    twins = [proofs.distance(c, rule) for c in tables]
    for case in tables:
        case.recorded = case.q
    assert caught(twins, [proofs.distance(c, rule) for c in tables])


# ---- noise ---------------------------------------------------------------------------------------


def one_token(p_V, q_V, shared: bool):
    """The emitted law of one drafted token: x by inverse transform of u, accepted if w q < p.

    Integrated exactly between breakpoints of the uniforms; `shared` makes w the same number as u.
    """
    cdf_V, emitted_V = np.cumsum(q_V), np.zeros(len(p_V))
    ratios_V = np.divide(p_V, q_V, out=np.ones(len(p_V)), where=q_V > 0)
    edges = np.unique(np.concatenate([[0.0, 1.0], cdf_V, ratios_V]).clip(0, 1))
    cells = [(b - a, (a + b) / 2) for a, b in itertools.pairwise(edges)]
    residual_V = np.maximum(p_V - q_V, 0) / np.maximum(p_V - q_V, 0).sum()
    for width, u in cells:
        x = min(np.searchsorted(cdf_V, u, side="right"), len(q_V) - 1)
        for chance, w in [(1.0, u)] if shared else cells:
            law_V = np.eye(len(p_V))[x] if w * q_V[x] < p_V[x] else residual_V
            emitted_V += width * chance * law_V
    return emitted_V


def test_accepting_with_the_drafting_noise_is_caught():
    tables = [(c.p[()], c.q[()]) for c in cases(chain(1), 4, "chains")]
    twins = [laws.total_variation(one_token(p, q, False), p) for p, q in tables]
    assert caught(twins, [laws.total_variation(one_token(p, q, True), p) for p, q in tables])


def matched(case, shared: bool):
    """The completed law of following the target's draws; `shared`: one uniform for all depths."""
    length = case.topology.max_depth + 1
    ((draft, logp_TxV, _),) = proofs.drafts(case)
    fields = case.topology.parents, draft.tokens_T, draft.valid_T
    cdf_TxV = np.cumsum(np.exp(logp_TxV), axis=1)
    edges = np.unique(np.append(cdf_TxV, [0.0, 1.0]).clip(0, 1))
    cells = [(b - a, (a + b) / 2) for a, b in itertools.pairwise(edges) if b > a]
    repeated = [(cell,) * length for cell in cells]
    grid = repeated if shared else itertools.product(cells, repeat=length)
    joint = np.zeros((case.vocab,) * length)
    for noise in grid:
        weight = noise[0][0] if shared else np.prod([width for width, _ in noise])
        pick = lambda d, v, noise=noise: min(  # noqa: E731
            np.searchsorted(cdf_TxV[v], noise[d][1], side="right"), case.vocab - 1
        )
        emitted = tuple(laws.slow_walk(*fields, pick)[1])
        joint[emitted] += weight * laws.joint(case.p, case.vocab, length, emitted)
    return laws.total_variation(joint, laws.joint(case.p, case.vocab, length))


def test_one_noise_row_along_a_matched_path_is_caught():
    tables = cases(backbone(2, 2), 2, "top") + cases(chain(2), 3, "top")
    twins = [proofs.distance(c, get_rule("match")) for c in tables]
    twins += [matched(c, shared=False) for c in tables]
    assert caught(twins, [matched(c, shared=True) for c in tables])
