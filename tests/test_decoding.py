"""The round and its drivers, driven by a drafter that makes every acceptance length happen."""

import dataclasses
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from drafters.cheat import make_cheat
from toys import PROMPTS, greedy_continuations, prefilled, run_recording, toy_target, truncated

import specjax
from specjax import decoding
from specjax.generation import make_engine, start
from specjax.sampling import Sampling
from specjax.trees import Topology, backbone, chain, paths

SHAPES = {
    "chain": chain(3),
    "backbone": backbone(3, 3),
    "paths": paths([(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1), (2, 0)]),
    "dynamic": None,
}
# Trees of one size for the dynamic case; the last rows of two of them are switched off.
TREES = [
    [-1, 0, 0, 1, 1, 2, 4, 4, 0],
    [-1, 0, 1, 2, 0, 0, 4, 6, 5],
    [-1, 0, 0, 0, 2, 2, 2, 4, 0],
]
VALID = [[True] * 9, [True] * 8 + [False], [True] * 7 + [False] * 2]

STOPS = (5, 11)
BATCH = [*PROMPTS, PROMPTS[3], [4, 0], PROMPTS[3], PROMPTS[3], [4, 0], PROMPTS[1]]
LIMITS = [24, 24, 17, 24, 18, 11, 23, 13, 15, 24]
WIDTH, SLOTS = 40, 64


@pytest.fixture(scope="module")
def target():
    return toy_target(seed=34, num_layers=2)


@pytest.fixture(scope="module")
def continuations(target):
    return greedy_continuations(target, BATCH, 30)


def tables(shape, continuations):
    """(truth, goal) for BATCH: the true continuation, and goals that visit every row in turn."""
    truth = np.zeros((len(BATCH), SLOTS), int)
    goal = np.zeros((len(BATCH), SLOTS), int)
    size = shape.nodes if shape else len(TREES[0])
    turns = itertools.cycle(np.random.default_rng(0).permutation(size).tolist())
    for b, (prompt, more) in enumerate(zip(BATCH, continuations, strict=True)):
        truth[b, : len(prompt) + len(more)] = prompt + more
        n = len(prompt) + 1
        while n < SLOTS:
            goal[b, n] = next(t for t in turns if shape or VALID[n % len(VALID)][t])
            n += int(shape_at(shape, n).depth_T[goal[b, n]]) + 1
    return truth, goal


def shape_at(shape, n):
    """The tree of a round that starts with n committed tokens."""
    return shape or Topology(tuple(TREES[n % len(TREES)]))


def cheat_for(target, shape, truth, goal, parents=TREES, valid=VALID):
    return make_cheat(target, shape, parents, valid, truth=truth, goal=goal)


class Case:
    """One shape decoded once, with the state of every round on record."""

    def __init__(self, target, shape, continuations):
        self.shape, self.target = shape, target
        self.truth, self.goal = tables(shape, continuations)
        drafter = cheat_for(target, shape, self.truth, self.goal)
        self.engine, self.params = make_engine(target, drafter, stop_tokens=STOPS)
        state = self.prefill(BATCH, LIMITS)
        compiled = decoding.jit_round._cache_size()
        state, self.record = run_recording(self.engine, self.params, state)
        self.compilations = decoding.jit_round._cache_size() - compiled
        self.final = self.record[-1]
        self.expected = [
            truncated(more, limit, STOPS) for more, limit in zip(continuations, LIMITS, strict=True)
        ]

    def prefill(self, prompts, limits, params=None, **options):
        params = params or self.params
        return prefilled(self.engine, params, prompts, limits, WIDTH, SLOTS, **options)

    def params_with(self, drafter):
        return self.params | {"drafter": drafter.params}

    def schedule(self, b):
        """[(goal row, its depth, tokens emitted)] of each round of request b, by simulation."""
        rounds, n, left = [], len(BATCH[b]) + 1, len(self.expected[b]) - 1
        while left > 0:
            goal = int(self.goal[b, n])
            depth = int(shape_at(self.shape, n).depth_T[goal])
            rounds.append((goal, depth, min(depth + 1, left)))
            n, left = n + rounds[-1][2], left - rounds[-1][2]
        return rounds


@pytest.fixture(scope="module", params=SHAPES)
def case(request, target, continuations):
    return Case(target, SHAPES[request.param], continuations)


def new_tokens(state):
    return [
        row[p:n].tolist()
        for row, p, n in zip(state.tokens_BxS, state.prompts_B, state.lengths_B, strict=True)
    ]


def emitted(state):
    return [[int(c) for c in row if c] for row in state.emitted_BxR]


# ---- what comes out ------------------------------------------------------------------------------


def test_greedy_output_is_the_target_s_own(case):
    assert new_tokens(case.final) == case.expected
    assert case.final.done_B.all()


def test_every_round_accepts_what_it_should(case):
    schedules = [case.schedule(b) for b in range(len(BATCH))]
    assert emitted(case.final) == [[count for *_, count in rounds] for rounds in schedules]
    assert case.final.rounds_B.tolist() == [1 + len(rounds) for rounds in schedules]
    # The run covers all there is: every row of the tree, every depth, cuts inside a run.
    goals = {goal for rounds in schedules for goal, *_ in rounds}
    size = len(TREES[0]) if case.shape is None else case.shape.nodes
    assert goals == set(range(size))
    cut = [
        tokens[-1] in STOPS
        for tokens, rounds in zip(case.expected, schedules, strict=True)
        if rounds[-1][2] < rounds[-1][1] + 1
    ]
    assert True in cut and False in cut  # by a stop token, by the length limit


def test_counts_add_up(case):
    for state in case.record:
        new = state.lengths_B - state.prompts_B
        np.testing.assert_array_equal(state.emitted_BxR.sum(1) + 1, new)
        assert (new <= LIMITS).all()


def test_one_compilation_for_all_rounds(case):
    rounds = len(case.record) - 1
    assert rounds > 6
    assert case.compilations == 1


# ---- the cache -----------------------------------------------------------------------------------


def layers_of(cache):
    return [*cache.k, *cache.v]


def test_cache_holds_all_tokens_but_the_newest(case):
    for state in case.record:
        np.testing.assert_array_equal(state.cache.lengths_B, state.lengths_B - 1)


def test_cache_equals_a_recompute_after_every_round(case):
    texts = [p + new for p, new in zip(BATCH, new_tokens(case.final), strict=True)]
    fresh = jax.device_get(case.prefill(texts, 1).cache)
    for state in case.record:
        for ours, theirs in zip(layers_of(state.cache), layers_of(fresh), strict=True):
            for b, n in enumerate(state.cache.lengths_B):
                np.testing.assert_allclose(ours[b, :, :n], theirs[b, :, :n], atol=1e-4)


def test_committed_slots_are_never_written_again(case):
    for before, after in itertools.pairwise(case.record):
        pairs = zip(layers_of(before.cache), layers_of(after.cache), strict=True)
        for (old, new), b in itertools.product(pairs, range(len(BATCH))):
            n = before.cache.lengths_B[b]
            np.testing.assert_array_equal(old[b, :, :n], new[b, :, :n])


# ---- what must not matter ------------------------------------------------------------------------


def test_junk_beyond_the_lengths_does_not_matter(case):
    state = case.prefill(BATCH, LIMITS)
    stale = np.arange(SLOTS) >= np.array(state.cache.lengths_B)[:, None]
    poison = lambda x: jnp.asarray(np.where(stale[:, None, :, None], np.float32(1e3), x))  # noqa: E731
    cache = state.cache.replace(
        k=tuple(map(poison, state.cache.k)), v=tuple(map(poison, state.cache.v))
    )
    junk = np.where(np.arange(SLOTS) >= np.array(state.lengths_B)[:, None], 3, state.tokens_BxS)
    state = decoding.run_host(
        case.engine, case.params, state.replace(cache=cache, tokens_BxS=jnp.asarray(junk))
    )
    assert new_tokens(jax.device_get(state)) == case.expected
    assert emitted(state) == emitted(case.final)


def test_wrong_tables_only_cost_rounds(case):
    """Adversarial drafter: any proposal whatever leaves the output alone."""
    rng = np.random.default_rng(1)
    truth, goal = rng.integers(12, size=case.truth.shape), case.goal
    params = case.params_with(cheat_for(case.target, case.shape, truth, goal))
    state = decoding.run_host(case.engine, params, case.prefill(BATCH, LIMITS, params))
    assert new_tokens(jax.device_get(state)) == case.expected
    assert int(state.rounds_B.sum()) > int(case.final.rounds_B.sum())


def test_order_of_siblings_and_rows_switched_off_do_not_matter(target, continuations):
    case = Case(target, None, continuations)  # compiled above
    rng = np.random.default_rng(2)
    parents, valid, place = [], [], []
    for tree, on in zip(TREES, VALID, strict=True):
        order = shuffled(rng, tree)
        where = np.argsort(order)  # old row -> new row
        parents.append([-1] + [int(where[tree[old]]) for old in order[1:]])
        valid.append([on[old] for old in order])
        place.append(where)
    assert parents != TREES and valid != VALID
    goal = np.stack([place[n % 3][case.goal[:, n]] for n in range(SLOTS)], axis=1)
    params = case.params_with(cheat_for(target, None, case.truth, goal, parents, valid))
    state = decoding.run_host(case.engine, params, case.prefill(BATCH, LIMITS, params))
    assert new_tokens(jax.device_get(state)) == case.expected
    assert emitted(state) == emitted(case.final)


def shuffled(rng, parents):
    """A random order of the rows in which parents still come before their children."""
    order, waiting = [0], list(range(1, len(parents)))
    while waiting:
        ready = [i for i in waiting if parents[i] in order]
        order.append(int(rng.choice(ready)))
        waiting.remove(order[-1])
    return order


# ---- drivers and shapes of the batch -------------------------------------------------------------


def test_a_request_alone(target, continuations):
    """Batch 1 takes its own code paths through the cache."""
    case = Case(target, SHAPES["backbone"], continuations)  # compiled above
    for b in (0, 2, 4):
        one = slice(b, b + 1)
        params = case.params_with(cheat_for(target, case.shape, case.truth[one], case.goal[one]))
        state = case.prefill(BATCH[one], LIMITS[b], params)
        state = jax.device_get(decoding.run_device(case.engine, params, state))
        assert new_tokens(state) == [case.expected[b]]
        assert emitted(state) == emitted(case.final)[one]
        n = state.cache.lengths_B[0]
        for ours, theirs in zip(layers_of(state.cache), layers_of(case.final.cache), strict=True):
            np.testing.assert_allclose(ours[0, :, :n], theirs[b, :, :n], atol=1e-5)


def test_the_two_drivers_agree_on_everything(target, continuations):
    case = Case(target, SHAPES["paths"], continuations)  # compiled above
    state = case.prefill(BATCH, LIMITS)
    device = jax.device_get(decoding.run_device(case.engine, case.params, state))
    host = case.final
    for name in ("lengths_B", "prompts_B", "limits_B", "done_B", "emitted_BxR", "rounds_B"):
        np.testing.assert_array_equal(getattr(device, name), getattr(host, name), err_msg=name)
    assert new_tokens(device) == new_tokens(host)
    for ours, theirs in zip(layers_of(device.cache), layers_of(host.cache), strict=True):
        for b, n in enumerate(host.cache.lengths_B):
            np.testing.assert_allclose(ours[b, :, :n], theirs[b, :, :n], atol=1e-5)


# ---- compilation and memory ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def fasteagle(target):
    return specjax.init_drafter("fasteagle", target, num_layers=2, candidates=2)


def test_the_caches_are_donated_whole(target, fasteagle):
    engine, params = make_engine(target, fasteagle, stop_tokens=STOPS)
    state = start(engine, params, [[1, 2], [3]], 9)
    compiled = decoding.jit_round.lower(engine, params, state).compile()
    caches = [state.cache.k, state.cache.v, state.drafter.cache.k, state.drafter.cache.v]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    after = decoding.jit_round(engine, params, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(caches))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_nothing_is_recompiled_inside_a_bucket(target, fasteagle):
    def compilations():
        return (
            decoding.jit_round._cache_size(),
            decoding._prefill_target._cache_size(),
            decoding._first_state._cache_size(),
        )

    options = dict(max_new_tokens=9, stop_tokens=STOPS)
    specjax.generate(target, [[1, 2], [3]], fasteagle, **options)
    warm = compilations()
    for prompts in ([[5, 6, 7], [8]], [[1] * 16, [9, 10]], [[0], [11] * 15]):
        specjax.generate(target, prompts, fasteagle, **options)
    specjax.generate(target, [[1, 2], [3]], fasteagle, seed=5, **options)
    other = dataclasses.replace(fasteagle, params=jax.device_put(jax.device_get(fasteagle.params)))
    specjax.generate(target, [[1, 2], [3]], other, **options)
    assert compilations() == warm


# ---- truncation ----------------------------------------------------------------------------------


def test_truncate_against_plain_python(target):
    rng = np.random.default_rng(3)
    stops = (2, 5)
    engine, _ = make_engine(target, None, stop_tokens=stops)
    B, A = 400, 5
    counts, remaining = rng.integers(1, A + 1, B), rng.integers(1, 8, B)
    tokens = np.where(np.arange(A) < counts[:, None], rng.integers(0, 9, (B, A)), -1)
    cut = jax.jit(decoding.truncate, static_argnums=0)
    count_B, done_B = jax.device_get(cut(engine, tokens, counts, remaining))
    for row, n, left, count, done in zip(tokens, counts, remaining, count_B, done_B, strict=True):
        kept = truncated(row[:n].tolist(), left, stops)
        assert int(count) == len(kept)
        assert bool(done) == (kept[-1] in stops or len(kept) == left)


# ---- the law of what is decoded ------------------------------------------------------------------

REQUESTS, NEW = 8192, 4
LAWS = {
    "vanilla-1.0": ("vanilla", Sampling(1.0)),
    "cheat-0.6": ("cheat", Sampling(0.6)),
    "cheat-1.3": ("cheat", Sampling(1.3)),
    "fasteagle-filtered": ("fasteagle", Sampling(1.0, 4, 0.9)),
}


@pytest.fixture(scope="module")
def five():
    """Five tokens: the joint law of three of them has 125 cells."""
    return toy_target(vocab_size=5, num_layers=1)


def exact_joint(target, prompt, sampling, length=3):
    """{tokens: probability} of the first `length` new tokens by plain full forwards."""
    V = target.config.vocab_size
    prefixes = [p for n in range(length) for p in itertools.product(range(V), repeat=n)]
    rows = np.zeros((len(prefixes), len(prompt) + length - 1), int)
    for row, prefix in zip(rows, prefixes, strict=True):
        row[: len(prompt) + len(prefix)] = [*prompt, *prefix]
    logits = np.asarray(target.logits(rows))
    table = {
        prefix: laws.filtered(logits[i, len(prompt) + len(prefix) - 1], sampling)
        for i, prefix in enumerate(prefixes)
    }
    joint = laws.joint(table, V, length)
    return {tokens: float(joint[tokens]) for tokens in itertools.product(range(V), repeat=length)}


@pytest.mark.parametrize("name", LAWS)
def test_sampled_tokens_follow_the_target_s_joint_law(five, name):
    kind, sampling = LAWS[name]
    drafter, prompt = None, [1, 3]
    if kind == "cheat":  # every request gets its own random proposals
        rng = np.random.default_rng(4)
        shape = backbone(2, 3)
        truth = rng.integers(5, size=(REQUESTS, 16))
        goal = rng.integers(shape.nodes, size=(REQUESTS, 16))
        drafter = make_cheat(five, shape, truth=truth, goal=goal)
    elif kind == "fasteagle":
        drafter = specjax.init_drafter("fasteagle", five, num_layers=2, candidates=2)
    engine, params = make_engine(five, drafter, sampling, stop_tokens=())
    state = prefilled(engine, params, [prompt] * REQUESTS, NEW, 2, 16, NEW + 1)
    state = jax.device_get(decoding.run_host(engine, params, state))
    assert (state.lengths_B - state.prompts_B == NEW).all()
    tokens = state.tokens_BxS[:, 2:5].tolist()
    law = exact_joint(five, prompt, sampling)
    assert laws.chi_square(Counter(map(tuple, tokens)), law) > 1e-3 / len(LAWS)
    assert state.emitted_BxR.max() == {"vanilla": 1, "cheat": 3, "fasteagle": 2}[kind]
