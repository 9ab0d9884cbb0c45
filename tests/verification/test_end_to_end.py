"""Whole generations follow the target: the joint law of the first tokens, over several rounds.

Thousands of requests with one prompt run in one batch; a chi-square test compares them with the
joint law computed from the target's own logits, one causal forward over every prefix.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from toys import broken, toy_target

import specjax
from specjax import decoding, generation
from specjax.sampling import Sampling
from specjax.verification import get_rule

VOCAB, PROMPT, REQUESTS, NEW = 5, [1, 3, 0], 3_000, 6
HOT, WARM, COLD = Sampling(1.3), Sampling(1.0), Sampling(0.6)
FILTERED = [Sampling(t, 4, 0.9) for t in (1.3, 1.0, 0.6)]
HOT_CUT, WARM_CUT, COLD_CUT = FILTERED

CHAIN = {
    "fasteagle": dict(candidates=1), "eagle3": dict(top_k=1), "draft_model": {},
    "kangaroo": dict(threshold=0.4), "prompt_lookup": {},
}  # fmt: skip
TREE = {
    "fasteagle": dict(candidates=2), "eagle3": dict(top_k=2, total_nodes=6), "token_recycling": {},
    "medusa": dict(tree_nodes=6), "p_eagle": dict(candidates=2),
}  # fmt: skip
WIDE = {"fasteagle": dict(candidates=3), "eagle3": dict(top_k=2, total_nodes=6)}

BRANCHED = {"eagle3": dict(branching=(2, 2))}


@pytest.fixture(scope="module")
def target():
    return toy_target(seed=13, vocab_size=VOCAB, num_layers=2, max_position_embeddings=64)


@pytest.fixture(scope="module")
def logits(target):
    """Logits after PROMPT and every continuation shorter than NEW: {prefix: logits_V}."""
    tails = np.array(list(itertools.product(range(VOCAB), repeat=NEW - 1)))
    rows = np.concatenate([np.tile(PROMPT, (len(tails), 1)), tails], axis=1)
    out = np.asarray(target.logits(rows.astype(np.int32)), np.float64)[:, len(PROMPT) - 1 :]
    table = {}
    for tail, row in zip(tails.tolist(), out, strict=True):
        for n in range(NEW):
            table.setdefault(tuple(tail[:n]), row[n])
    return table


@pytest.fixture(scope="module")
def joint(logits):
    """sampling -> the exact joint law of NEW tokens."""

    @functools.cache
    def of(sampling):
        table = {prefix: laws.filtered(row, sampling) for prefix, row in logits.items()}
        return laws.joint(table, VOCAB, NEW)

    return of


@pytest.fixture(scope="module")
def drafter(target):
    """(name, tree shape) -> a drafter of depth 2, near enough to the target to be accepted."""

    @functools.cache
    def of(name, shape):
        steps = {
            "fasteagle": dict(num_layers=2), "eagle3": dict(steps=2),
            "draft_model": dict(num_layers=1, draft_depth=2), "medusa": dict(heads=2),
            "p_eagle": dict(num_layers=2, draft_depth=2),
            "kangaroo": dict(exit_layer=1, draft_depth=2),
            "prompt_lookup": dict(draft_depth=2),
            "token_recycling": dict(successors=2, tree_nodes=4),
            "fasteagle_x": dict(num_layers=2, rank=2, pool=4, candidates=2),
            "dflash": dict(num_layers=1, block_size=3, candidates=2),
            "rasd": dict(min_suffix=1, continuation=2, hits=2, retrieved_nodes=4),
        }.get(name, {})  # fmt: skip
        return specjax.init_drafter(name, target, **steps, **dict(shape))

    return of


def marginal(joint, tokens, first, last):
    """(observed, expected) cells of tokens first..last-1."""
    axes = tuple(i for i in range(NEW) if not first <= i < last)
    law = joint.sum(axis=axes)
    seen, counts = np.unique(tokens[:, first:last], axis=0, return_counts=True)
    observed = {tuple(x): int(n) for x, n in zip(seen.tolist(), counts, strict=True)}
    return observed, {x: float(p) for x, p in np.ndenumerate(law) if p > 0}


def generated(target, drafter, sampling, rule, seed):
    """(tokens, emitted by round) of REQUESTS requests for PROMPT."""
    engine, params = generation.make_engine(target, drafter, sampling, (), rule)
    state = generation.start(engine, params, [PROMPT] * REQUESTS, NEW, seed)
    state = decoding.run_device(engine, params, state)
    new, accepts = generation.collect(state)
    return np.array(new), accepts


RUNS = [
    ("match", {}, "fasteagle", TREE, WARM),
    ("match", {}, "eagle3", TREE, COLD_CUT),
    ("token", {}, "fasteagle", CHAIN, COLD),
    ("token", {}, "eagle3", CHAIN, HOT_CUT),
    ("block", {}, "fasteagle", CHAIN, HOT),
    ("block", {}, "eagle3", CHAIN, WARM),
    ("recursive_rejection", {}, "fasteagle", WIDE, COLD_CUT),
    ("recursive_rejection", {"replacement": True}, "fasteagle", TREE, HOT),
    ("recursive_rejection", {}, "eagle3", TREE, WARM),
    ("traversal", {}, "fasteagle", WIDE, WARM_CUT),
    ("traversal", {"replacement": True}, "fasteagle", TREE, COLD),
    ("traversal", {}, "eagle3", TREE, HOT),
    ("k_seq", {}, "fasteagle", TREE, WARM),
    ("k_seq", {}, "eagle3", TREE, COLD),
    ("recursive_rejection", {}, "eagle3", BRANCHED, HOT_CUT),
    ("recursive_rejection", {"replacement": True}, "eagle3", BRANCHED, COLD),
    ("traversal", {"replacement": True}, "eagle3", BRANCHED, WARM),
    ("token", {}, "draft_model", CHAIN, WARM),
    ("block", {}, "draft_model", CHAIN, COLD_CUT),
    ("traversal", {}, "medusa", TREE, WARM),
    ("traversal", {"replacement": True}, "medusa", TREE, COLD),
    ("recursive_rejection", {}, "medusa", TREE, COLD_CUT),
    ("traversal", {}, "p_eagle", TREE, COLD),
    ("match", {}, "prompt_lookup", CHAIN, WARM),
    ("match", {}, "token_recycling", TREE, WARM_CUT),
    ("token", {}, "kangaroo", CHAIN, COLD),
    ("block", {}, "kangaroo", CHAIN, WARM_CUT),
]


def name_of(run):
    name, parameters, drafter, _, s = run
    return "-".join([name, *parameters, drafter, str(s.temperature), *(["cut"] * (s.top_k > 0))])


# Each compiles its own round: by default one run for every rule, both drafters taking turns.
QUICK = {
    "match-eagle3-0.6-cut", "token-fasteagle-0.6", "block-eagle3-1.0",
    "recursive_rejection-fasteagle-0.6-cut", "recursive_rejection-replacement-eagle3-0.6",
    "traversal-eagle3-1.3", "k_seq-fasteagle-1.0",
}  # fmt: skip


def marked(run):
    marks = () if name_of(run) in QUICK else pytest.mark.slow
    return pytest.param(run, id=name_of(run), marks=marks)


@pytest.mark.parametrize("run", map(marked, RUNS))
def test_the_joint_law_of_the_first_tokens(target, drafter, joint, run):
    name, parameters, drafter_name, shapes, sampling = run
    drafter = drafter(drafter_name, tuple(shapes[drafter_name].items()))
    rule = get_rule(name, **parameters)
    tokens, accepts = generated(target, drafter, sampling, rule, seed=RUNS.index(run))
    rounds = np.array([len(a) - 1 for a in accepts])  # prefill's token is not a round's
    assert np.mean(rounds >= 3) > 0.3 and np.mean(rounds < NEW - 1) > 0.1
    assert max(max(a) for a in accepts) == 3  # whole drafts are accepted, and an extra token
    for first, last in ((0, 4), (2, NEW)):
        p_value = laws.chi_square(*marginal(joint(sampling), tokens, first, last))
        assert p_value > 1e-2 / (2 * len(RUNS)), (first, last)


@pytest.mark.parametrize("run", [marked(run) for run in RUNS if name_of(run) in QUICK])
def test_broken_weights_keep_the_law(target, drafter, joint, run):
    """Weights that are NaN everywhere draft from some law, and the rules are told that one."""
    name, parameters, drafter_name, shapes, sampling = run
    whole = drafter(drafter_name, tuple(shapes[drafter_name].items()))
    nans = dataclasses.replace(whole, params=broken(whole.params))
    tokens, _ = generated(target, nans, sampling, get_rule(name, **parameters), RUNS.index(run))
    for first, last in ((0, 4), (2, NEW)):
        p_value = laws.chi_square(*marginal(joint(sampling), tokens, first, last))
        assert p_value > 1e-2 / (2 * len(RUNS)), (first, last)


@pytest.mark.parametrize("name", specjax.drafter_names())
def test_the_joint_law_with_every_drafter(target, drafter, joint, name):
    """By its default rule: a new drafter is covered once it is registered."""
    tokens, accepts = generated(target, drafter(name, ()), WARM, None, seed=7)
    assert max(max(a) for a in accepts) > 1
    for first, last in ((0, 4), (2, NEW)):
        p_value = laws.chi_square(*marginal(joint(WARM), tokens, first, last))
        assert p_value > 1e-2 / (2 * len(specjax.drafter_names())), (first, last)


def test_every_exact_rule_and_both_drafters_are_covered():
    exact = {n for n in specjax.verification.rule_names() if get_rule(n).exact} - {"greedy"}
    assert {name.split("-")[0] for name in QUICK} == {run[0] for run in RUNS} == exact
    assert {name_of(run) for run in RUNS} > QUICK
    for drafter in ("fasteagle", "eagle3"):
        assert {run[0] for run in RUNS if run[2] == drafter} == exact


def test_a_recorded_law_of_another_temperature_is_caught(target, drafter, joint, monkeypatch):
    """The same machinery, told a law that the draft was not drawn from."""
    chain = drafter("fasteagle", tuple(CHAIN["fasteagle"].items()))
    monkeypatch.setattr(
        "specjax.verification.token.child_law",
        lambda draft, node, child, rows: jax.nn.softmax(jnp.maximum(draft.law_TxV[node], -1e3) / 3),
    )
    sampling = Sampling(1.0001)  # its own compilation
    tokens, _ = generated(target, chain, sampling, get_rule("token"), seed=0)
    assert laws.chi_square(*marginal(joint(sampling), tokens, 0, 4)) < 1e-6
