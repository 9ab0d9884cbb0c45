"""What must hold of every law: it is a law, bounds and orders of acceptance, limits, reductions."""

import itertools

import numpy as np
import proofs
import pytest

from specjax.trees import backbone, chain, chains, paths
from specjax.verification import get_rule, law

RRS, TRAVERSAL = get_rule("recursive_rejection"), get_rule("traversal")
RRS_REPLACED = get_rule("recursive_rejection", replacement=True)
TRAVERSAL_REPLACED = get_rule("traversal", replacement=True)
TOKEN, BLOCK, K_SEQ, MATCH = (get_rule(n) for n in ("token", "block", "k_seq", "match"))
BUSHY = paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 1, 0)])
KINDS = [
    (TOKEN, chain(3), "chains"),
    (BLOCK, chain(3), "chains"),
    (K_SEQ, chains(3, 2), "chains"),
    (MATCH, BUSHY, "without_replacement"),
    (get_rule("greedy"), BUSHY, "top"),
    (RRS, BUSHY, "without_replacement"),
    (RRS, BUSHY, "top"),
    (RRS_REPLACED, BUSHY, "with_replacement"),
    (TRAVERSAL, BUSHY, "without_replacement"),
    (TRAVERSAL, BUSHY, "top"),
    (TRAVERSAL_REPLACED, BUSHY, "with_replacement"),
    (get_rule("typical"), BUSHY, "top"),
    (get_rule("judge"), BUSHY, "top"),
    (get_rule("unverified"), BUSHY, "top"),
    (get_rule("judge", base="token"), chain(3), "chains"),
]


def id_of(case):
    rule, _, kind = case
    return f"{rule.name}-{kind}"


@pytest.mark.parametrize("case", KINDS, ids=id_of)
def test_every_law_is_a_law(case):
    rule, shape, kind = case
    rng = np.random.default_rng(0)
    for _ in range(100):
        drawn = proofs.random_case(rng, shape, 5, kind, zeros=rng.choice([0.0, 0.3, 0.6]))
        draft, logp_TxV = proofs.random_draft(rng, drawn)
        force_T = rng.random(shape.nodes) < 0.3 if rule.name == "judge" else None
        stop_T, next_TxV = law(draft, logp_TxV, rule, force_T)
        assert np.isfinite(stop_T).all() and np.isfinite(next_TxV).all()
        assert (stop_T >= 0).all() and (next_TxV >= 0).all()
        assert stop_T.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(next_TxV[stop_T > 0].sum(axis=1), 1, atol=1e-12)
        if rule.exact:  # what the target cannot say is neither accepted nor emitted
            stopped = stop_T > 1e-12
            assert next_TxV[stopped][np.isneginf(logp_TxV[stopped])].sum() <= 1e-12
            for v in np.flatnonzero(stopped):
                while v:
                    parent = draft.parent_T[v]
                    assert np.isfinite(logp_TxV[parent, draft.tokens_T[v]])
                    v = parent


# ---- how much is accepted ------------------------------------------------------------------------


def accepted(case, rule):
    return proofs.prove(case, rule).accepted


def transport_bound(p_V, draws):
    """1 + min over sets H of p(H) - Pr(all drafts in H): no exact rule accepts more."""
    tokens = range(len(p_V))
    sets = itertools.chain.from_iterable(itertools.combinations(tokens, n) for n in range(len(p_V)))
    sets = [frozenset(H) for H in (*sets, tokens)]
    gaps = [p_V[list(H)].sum() - sum(w for x, w in draws if H.issuperset(x)) for H in sets]
    return 1 + min(gaps)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "rule", [RRS, RRS_REPLACED, TRAVERSAL, TRAVERSAL_REPLACED, K_SEQ, TOKEN, BLOCK],
    ids=lambda r: f"{r.name}-{r.draws}",
)  # fmt: skip
def test_one_step_accepts_between_one_minus_tv_and_optimal_transport(rule, count):
    if rule.chain_only and count > 1:
        pytest.skip("chains only")
    rng = np.random.default_rng(count)
    for zeros in (0.0, 0.3) * 4:
        case = proofs.random_case(rng, backbone(1, count), 4, rule.draws, zeros)
        p_V, q_V = case.p[()], case.q[()]
        found, overlap = accepted(case, rule), np.minimum(p_V, q_V).sum()
        bound = transport_bound(p_V, proofs.sibling_draws(q_V, count, rule.draws))
        assert overlap - 1e-12 <= found <= bound + 1e-12
        if count == 1:
            assert found == pytest.approx(overlap, abs=1e-12) == pytest.approx(bound, abs=1e-12)


def test_block_accepts_at_least_what_token_does():
    rng, gains = np.random.default_rng(1), []
    for i in range(30):
        case = proofs.random_case(rng, chain(1 + i % 3), 3, "chains", 0.3 * (i % 2))
        gains.append(accepted(case, BLOCK) - accepted(case, TOKEN))
        assert gains[-1] >= -1e-12
        if i % 3 == 0:
            assert abs(gains[-1]) <= 1e-12  # one token: nothing to win
        case.kind = "top"
        assert accepted(case, BLOCK) == pytest.approx(accepted(case, TOKEN), abs=1e-12)
    assert max(gains) > 0.01


@pytest.mark.parametrize("shape", [backbone(2, 2), paths([(0,), (1,), (0, 0), (1, 0)])], ids=repr)
def test_traversal_accepts_at_least_recursive_rejection_and_that_more_than_match(shape):
    rng, sums = np.random.default_rng(2), np.zeros(3)
    for i in range(12):
        case = proofs.random_case(rng, shape, 3, "without_replacement", 0.3 * (i % 2))
        found = [accepted(case, rule) for rule in (TRAVERSAL, RRS, MATCH)]
        assert found[0] >= found[1] - 1e-12
        sums += found
        case.kind = "top"
        found = [accepted(case, rule) for rule in (TRAVERSAL, RRS, MATCH)]
        assert np.ptp(found) <= 1e-12
    assert sums[0] > sums[1] + 0.1 and sums[1] > sums[2] + 0.1


def test_drawing_without_replacement_is_worth_it():
    rng = np.random.default_rng(3)
    for _ in range(30):
        case = proofs.random_case(rng, backbone(1, 3), 4, "without_replacement")
        more = accepted(case, RRS)
        case.kind = "with_replacement"
        assert more >= accepted(case, RRS_REPLACED) - 1e-12


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [k for k in KINDS if k[0].exact and k[2] != "top"], ids=id_of)
def test_disjoint_supports_accept_nothing_and_p_decides(case):
    rule, shape, kind = case
    rng = np.random.default_rng(4)
    drawn = proofs.random_case(rng, shape, 8, kind, zeros=0.0)
    halves = np.arange(8) < 4
    drawn.p = {x: p * halves / (p * halves).sum() for x, p in drawn.p.items()}
    drawn.q = {x: q * ~halves / (q * ~halves).sum() for x, q in drawn.q.items()}
    for _ in range(20):
        draft, logp_TxV = proofs.random_draft(rng, drawn)
        stop_T, next_TxV = law(draft, logp_TxV, rule)
        assert stop_T[0] == pytest.approx(1, abs=1e-14)
        np.testing.assert_allclose(next_TxV[0], drawn.p[()], atol=1e-14)


@pytest.mark.parametrize("case", [k for k in KINDS if k[0].exact and k[2] != "top"], ids=id_of)
def test_the_target_s_own_draft_is_accepted_whole(case):
    rule, shape, kind = case
    if rule in (MATCH, get_rule("greedy")):
        pytest.skip("matching draws its own token")
    rng = np.random.default_rng(5)
    drawn = proofs.random_case(rng, shape, 4, kind)
    drawn.q = drawn.p
    for _ in range(20):
        draft, logp_TxV = proofs.random_draft(rng, drawn)
        stop_T, _ = law(draft, logp_TxV, rule)
        leaf = 0  # the first child of the first child ...
        while draft.child_TxC[leaf, 0] >= 0:
            leaf = draft.child_TxC[leaf, 0]
        # k-SEQ's scale is a root of order k at p = q: found to a kth of the digits only.
        assert stop_T[leaf] == pytest.approx(1, abs=1e-4 if rule == K_SEQ else 1e-12)


@pytest.mark.parametrize("rule", [MATCH, RRS, TRAVERSAL], ids=lambda r: r.name)
@pytest.mark.parametrize("kind", ["without_replacement", "top"])
def test_all_tokens_as_children_cover_the_target(rule, kind):
    rng = np.random.default_rng(6)
    for zeros in (0.0, 0.3, 0.6):
        case = proofs.random_case(rng, backbone(1, 4), 4, kind, zeros)
        assert accepted(case, rule) == pytest.approx(1, abs=1e-12)


# ---- reductions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other, kind",
    [
        (RRS, TOKEN, "chains"),
        (RRS_REPLACED, TOKEN, "chains"),
        (K_SEQ, TOKEN, "chains"),
        (TRAVERSAL, BLOCK, "chains"),
        (TRAVERSAL_REPLACED, BLOCK, "chains"),
        (RRS, MATCH, "top"),
        (TOKEN, MATCH, "top"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_rules_agree_where_one_reduces_to_the_other(one, other, kind):
    rng = np.random.default_rng(7)
    shape = chain(3) if TOKEN in (one, other) or BLOCK in (one, other) else BUSHY
    for i in range(60):
        valid = np.arange(shape.nodes) < rng.integers(1, shape.nodes + 1)
        case = proofs.random_case(rng, shape, 4, kind, 0.3 * (i % 2), valid)
        draft, logp_TxV = proofs.random_draft(rng, case)
        (stop_T, next_TxV), (other_T, other_TxV) = (
            law(draft, logp_TxV, rule) for rule in (one, other)
        )
        np.testing.assert_allclose(stop_T, other_T, atol=1e-12)
        seen = stop_T > 1e-9
        np.testing.assert_allclose(next_TxV[seen], other_TxV[seen], atol=1e-6)


@pytest.mark.parametrize("case", KINDS, ids=id_of)
def test_without_a_draft_every_rule_is_plain_sampling(case):
    rule, shape, kind = case
    rng = np.random.default_rng(8)
    valid = np.arange(shape.nodes) < 1
    draft, logp_TxV = proofs.random_draft(rng, proofs.random_case(rng, shape, 4, kind, 0.3, valid))
    stop_T, next_TxV = law(draft, logp_TxV, rule)
    assert stop_T[0] == 1
    expected = np.exp(logp_TxV[0]) if rule.name != "greedy" else np.eye(4)[logp_TxV[0].argmax()]
    np.testing.assert_allclose(next_TxV[0], expected, atol=1e-15)
