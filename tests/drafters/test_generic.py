"""What must hold for every drafter on every kind of tree it can draw up.

A new drafter is tested by being listed in `DRAFTERS`; give it lines in `VARIANTS` where its default
configuration is too large for the toy target or leaves some kind of tree untried.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import (
    PROMPTS,
    broken,
    greedy_continuations,
    prefilled,
    run_recording,
    toy_target,
    truncated,
)

import specjax
from specjax import decoding
from specjax.cache import KVCache
from specjax.drafters.features import FeatureState
from specjax.drafters.stopping import init_head
from specjax.drafters.token_recycling import Successors
from specjax.generation import make_engine, resume
from specjax.models.checkpoint import Checkpoint
from specjax.models.transformer import forward
from specjax.sampling import Sampling
from specjax.verification import get_rule

RETRIEVED = dict(continuation=5, retrieved_nodes=9, min_suffix=1)
VARIANTS = {
    "fasteagle": {
        "chain": dict(num_layers=3),
        "backbone": dict(num_layers=3, candidates=3, entry="wide_qkv"),
    },
    "fasteagle_x": {
        "backbone": dict(num_layers=3, candidates=3, rank=4),
        "paths": dict(num_layers=3, rank=4, paths=((0,), (1,), (2,), (0, 0), (1, 0), (0, 0, 0))),
        "grown": dict(num_layers=3, candidates=3, rank=4, total_nodes=9),
    },
    "eagle3": {
        "chain": dict(steps=3),
        "tree": dict(steps=3, top_k=3, total_nodes=9),
    },
    "draft_model": {
        "chain": dict(draft_depth=3),
        "confidence": dict(draft_depth=4, stop="confidence", threshold=0.12),
        "specdec": dict(draft_depth=4, stop="specdec", threshold=0.6),
    },
    "kangaroo": {
        "chain": dict(exit_layer=2, draft_depth=3, stop="fixed"),
        "confidence": dict(exit_layer=2, draft_depth=4, threshold=0.12),
    },
    "dflash": {
        "chain": dict(num_layers=2, block_size=4),
        "backbone": dict(num_layers=2, block_size=5, draft_depth=3, candidates=3),
    },
    "medusa": {
        "chain": dict(heads=3, paths=((0, 0, 0),)),
        "tree": dict(heads=3, blocks=2, tree_nodes=14),
    },
    "p_eagle": {
        "chain": dict(num_layers=2, draft_depth=3),
        "backbone": dict(num_layers=2, draft_depth=3, candidates=3),
    },
    "rasd": {
        "alone": RETRIEVED,
        "fused": RETRIEVED
        | dict(inner="fasteagle", inner_options=dict(num_layers=3, candidates=2), prune=False),
        "pruned": RETRIEVED
        | dict(inner="fasteagle", inner_options=dict(num_layers=3), prune_top=3),
        "fused with a model": RETRIEVED
        | dict(inner="draft_model", inner_options=dict(draft_depth=2, num_layers=1), prune=False),
    },
    "prompt_lookup": {"chain": dict(max_ngram=2, draft_depth=3)},
    "token_recycling": {"tree": dict(successors=3, tree_nodes=8)},
}
CASES = [
    pytest.param((name, config), id=f"{name}-{label}")
    for name in specjax.drafter_names()
    for label, config in VARIANTS.get(name, {"default": {}}).items()
]
STOPS = (4, 9)
LIMITS = [24, 24, 17, 23]
WIDTH, SLOTS = 40, 64


@pytest.fixture(scope="module")
def target():
    return toy_target()


@pytest.fixture(scope="module")
def expected(target):
    """Plain greedy decoding, one full forward a token."""
    endless = greedy_continuations(target, PROMPTS, max(LIMITS))
    return [truncated(e, limit, STOPS) for e, limit in zip(endless, LIMITS, strict=True)]


class Case:
    """One drafter, and a ragged batch decoded with it, every round on record."""

    def __init__(self, target, name, config):
        self.target, self.name, self.config = target, name, config
        self.drafter = specjax.init_drafter(name, target, seed=1, **config)
        if config.get("stop") == "specdec":  # a fresh head stops nothing
            head = init_head(jax.random.key(1), target.config.hidden_size)
            params = self.drafter.params | {"buffers": {"acceptance": head}}
            self.drafter = dataclasses.replace(self.drafter, params=params)
        self.engine, self.params = make_engine(target, self.drafter, stop_tokens=STOPS)
        state = self.prefill(PROMPTS, LIMITS)
        compiled = decoding.jit_round._cache_size()
        _, self.record = run_recording(self.engine, self.params, state)
        self.compilations = decoding.jit_round._cache_size() - compiled
        self.final = self.record[-1]

    def prefill(self, prompts, limits, **options):
        return prefilled(self.engine, self.params, prompts, limits, WIDTH, SLOTS, **options)


@pytest.fixture(scope="module", params=CASES)
def case(request, target):
    return Case(target, *request.param)


def new_tokens(state):
    return [
        row[p:n].tolist()
        for row, p, n in zip(state.tokens_BxS, state.prompts_B, state.lengths_B, strict=True)
    ]


def emitted(state):
    return [[int(c) for c in row if c] for row in state.emitted_BxR]


def drafter_caches(state):
    """Every KVCache inside a drafter's state."""
    is_cache = lambda x: isinstance(x, KVCache)  # noqa: E731
    return [x for x in jax.tree.leaves(state.drafter, is_leaf=is_cache) if is_cache(x)]


def committed_rows(cache):
    """(request, layer's array, committed slots) for every layer and request."""
    arrays = jax.tree.leaves((cache.k, cache.v))
    return [(b, array, n) for array in arrays for b, n in enumerate(cache.lengths_B)]


@functools.partial(jax.jit, static_argnums=(1, 3))
def plain_features(params, config, texts, taps):
    return forward(params, config, texts, taps=taps).taps_BxTxM


# ---- what comes out ------------------------------------------------------------------------------


def test_greedy_output_is_the_target_s_own(case, expected):
    assert new_tokens(case.final) == expected
    assert any(tokens[-1] in STOPS for tokens in expected)  # some stop, some run to the limit
    assert any(len(tokens) == limit for tokens, limit in zip(expected, LIMITS, strict=True))


def test_broken_weights_cost_speed_and_nothing_else(case, expected):
    if not jax.tree.leaves(case.drafter.params):
        pytest.skip("this drafter has no weights")
    params = case.params | {"drafter": broken(case.drafter.params)}
    state = decoding.run_host(
        case.engine, params, prefilled(case.engine, params, PROMPTS, LIMITS, WIDTH, SLOTS)
    )
    assert new_tokens(jax.device_get(state.replace(keys_B=None))) == expected


def test_something_is_accepted(case):
    """Otherwise most of these tests would say little: choose another entry in VARIANTS."""
    counts = [c for row in emitted(case.final) for c in row]
    assert max(counts) > 1
    assert max(counts) <= case.engine.drafter.depth + 1


def test_counts_add_up(case):
    for state in case.record:
        np.testing.assert_array_equal(
            state.emitted_BxR.sum(1) + 1, state.lengths_B - state.prompts_B
        )


def skip_chain(case):
    """Where a drafter has a tree too, that stands for its chain: cases cost seconds to compile."""
    variants = VARIANTS.get(case.name, {})
    if len(variants) > 1 and case.config == variants.get("chain"):
        pytest.skip("covered by the tree")


def picked(state, order):
    """The same requests in another batch; on the host, so that nothing is compiled for it."""
    host = jax.device_get(state.replace(keys_B=jax.random.key_data(state.keys_B)))
    host = jax.device_put(jax.tree.map(lambda x: x[np.array(order)], host))
    return host.replace(keys_B=jax.random.wrap_key_data(host.keys_B))


def test_a_request_alone_gives_what_it_gives_in_a_batch(case, expected):
    """Batch 1, and the `while_loop` driver in place of the host's."""
    skip_chain(case)
    start = case.prefill(PROMPTS, LIMITS)
    for b in range(len(PROMPTS)):
        state = decoding.run_device(case.engine, case.params, picked(start, [b]))
        state = jax.device_get(state.replace(keys_B=None))
        assert new_tokens(state) == [expected[b]]
        assert emitted(state) == [emitted(case.final)[b]]


def adversarial(drafter, key):
    """The drafter with other tokens in every valid row below the root, at random each round."""

    class Adversary(type(drafter)):
        def draft(self, params, target_params, state, context, keys_B):
            tree, state = super().draft(params, target_params, state, context, keys_B)
            at = jnp.sum(context.lengths_B)  # rounds differ, rows of one tree too
            tokens = jax.random.randint(
                jax.random.fold_in(key, at), tree.tokens_T.shape, 0, self.target.vocab_size
            )
            drafted = tree.valid_T & (tree.depth_T > 0)
            return tree.replace(tokens_T=jnp.where(drafted, tokens, tree.tokens_T)), state

    fields = {f.name: getattr(drafter, f.name) for f in dataclasses.fields(drafter)}
    return Adversary(**fields)


@pytest.mark.parametrize("name", specjax.drafter_names())
def test_adversarial_drafts_never_change_the_output(target, expected, name):
    """Random tokens in place of what was drafted: siblings may be equal, all may be wrong."""
    config = list(VARIANTS.get(name, {"default": {}}).values())[-1]
    drafter = specjax.init_drafter(name, target, seed=1, **config)
    engine, params = make_engine(target, drafter, stop_tokens=STOPS)
    engine = dataclasses.replace(engine, drafter=adversarial(engine.drafter, jax.random.key(2)))
    start = prefilled(engine, params, PROMPTS, LIMITS, WIDTH, SLOTS)
    state = jax.device_get(decoding.run_device(engine, params, start).replace(keys_B=None))
    assert new_tokens(state) == expected
    assert max(c for row in emitted(state) for c in row) > 1  # a random token is right now and then


def test_sampled_requests_do_not_see_their_neighbours(case):
    """Noise belongs to the request: another place, other company, the same tokens."""
    skip_chain(case)
    engine = dataclasses.replace(case.engine, rule=get_rule("match"), sampling=Sampling(0.9))
    start = case.prefill(PROMPTS, LIMITS)

    def run(order):
        state = decoding.run_host(engine, case.params, picked(start, order))
        state = jax.device_get(state.replace(keys_B=None))
        return new_tokens(state), emitted(state)

    tokens, counts = run([0, 1, 2, 3])
    for order in ([3, 2, 1, 0], [2, 0, 2, 2]):
        again_tokens, again_counts = run(order)
        assert again_tokens == [tokens[i] for i in order]
        assert again_counts == [counts[i] for i in order]
    assert tokens != new_tokens(case.final)


# ---- state ---------------------------------------------------------------------------------------


def test_committed_slots_are_never_written_again(case):
    for before, after in itertools.pairwise(case.record):
        olds = [before.cache, *drafter_caches(before)]
        news = [after.cache, *drafter_caches(after)]
        for old, new in zip(olds, news, strict=True):
            pairs = zip(committed_rows(old), committed_rows(new), strict=True)
            for (b, was, n), (_, now, _) in pairs:
                np.testing.assert_array_equal(was[b, :, :n], now[b, :, :n])


def test_state_equals_one_rebuilt_from_the_committed_tokens(case):
    texts = [p + new for p, new in zip(PROMPTS, new_tokens(case.final), strict=True)]
    fresh = jax.device_get(case.prefill(texts, 1))
    for state in case.record:
        np.testing.assert_array_equal(state.cache.lengths_B, state.lengths_B - 1)
        ours = [state.cache, *drafter_caches(state)]
        theirs = [fresh.cache, *drafter_caches(fresh)]
        for a, b in zip(ours, theirs, strict=True):
            pairs = zip(committed_rows(a), committed_rows(b), strict=True)
            for (row, was, n), (_, again, _) in pairs:
                np.testing.assert_allclose(was[row, :, :n], again[row, :, :n], atol=1e-5)


# Caches and pending rows are compared elsewhere; successors are learnt from rejected rows as well.
COMPARED_ELSEWHERE = (KVCache, FeatureState, Successors)


def test_all_other_state_is_one_rebuilt_from_the_committed_tokens(case):
    texts = [p + new[:-1] for p, new in zip(PROMPTS, new_tokens(case.final), strict=True)]
    fresh = jax.device_get(case.prefill(texts, 1))  # the root drawn anew: the same
    np.testing.assert_array_equal(fresh.lengths_B, case.final.lengths_B)
    is_other = lambda x: isinstance(x, COMPARED_ELSEWHERE)  # noqa: E731
    ours, theirs = (
        [x for x in jax.tree.leaves(s.drafter, is_leaf=is_other) if not is_other(x)]
        for s in (case.final, fresh)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_pending_rows_pair_features_with_the_token_that_follows(case):
    """Row p holds the target's features of x_p and the token x_{p+1}, for every new p."""
    if not isinstance(case.final.drafter, FeatureState):
        pytest.skip("this drafter reads no features")
    texts = case.final.tokens_BxS
    taps = plain_features(case.target.params, case.target.config, texts, case.engine.drafter.taps)
    longest = 0
    for state in case.record:
        pending, cache = state.drafter.pending, state.drafter.cache
        np.testing.assert_array_equal(cache.lengths_B + pending.counts_B, state.lengths_B - 1)
        for b, count in enumerate(pending.counts_B):
            rows = np.arange(count) + cache.lengths_B[b]
            np.testing.assert_array_equal(pending.tokens_BxA[b, :count], texts[b, rows + 1])
            np.testing.assert_allclose(
                pending.taps_BxAxM[b, :count], np.asarray(taps)[b, rows], atol=1e-4
            )
            longest = max(longest, count)
    assert longest > 1


def test_one_compilation_for_all_rounds(case):
    rounds = len(case.record) - 1
    assert rounds > 6
    assert case.compilations == 1


def test_rounds_that_are_done_change_nothing(case):
    state = case.prefill(PROMPTS, 1)  # done with prefill's own token
    state, record = run_recording(case.engine, case.params, state)
    assert len(record) == 2
    assert new_tokens(record[-1]) == [tokens[:1] for tokens in new_tokens(case.final)]
    assert emitted(record[-1]) == [[]] * len(PROMPTS)


# ---- conversations -------------------------------------------------------------------------------

TURNS = [[3, 7], [5], [8, 0, 1], [2, 2, 6, 10]]


def fed(target, texts, count):
    """What plain greedy decoding adds to texts within `count` tokens, up to the stop tokens."""
    return [truncated(e, count, STOPS) for e in greedy_continuations(target, texts, count)]


def assert_rows_equal(state, fresh):
    """Target and drafter caches hold the same committed rows."""
    pairs = zip(
        [state.cache, *drafter_caches(state)], [fresh.cache, *drafter_caches(fresh)], strict=True
    )
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours.lengths_B, theirs.lengths_B)
        rows = zip(committed_rows(ours), committed_rows(theirs), strict=True)
        for (b, was, n), (_, again, _) in rows:
            np.testing.assert_allclose(was[b, :, :n], again[b, :, :n], atol=1e-5)
    if isinstance(state.drafter, FeatureState):  # one row is pending, the prompt's last
        ours, theirs = state.drafter.pending, fresh.drafter.pending
        np.testing.assert_array_equal(ours.counts_B, 1)
        np.testing.assert_array_equal(ours.tokens_BxA[:, 0], theirs.tokens_BxA[:, 0])
        np.testing.assert_allclose(ours.taps_BxAxM[:, 0], theirs.taps_BxAxM[:, 0], atol=1e-5)


@pytest.mark.parametrize("parting", [False, True], ids=["goes on", "parts"])
def test_a_continued_state_is_one_prefilled_from_scratch(case, target, parting):
    """Two more turns on one state, cut short before its end: text is added to all of what was
    decoded, or to a part of it that the rest is then no part of.
    """
    engine, params = case.engine, case.params
    state = case.prefill(PROMPTS, LIMITS)
    for _ in range(3):
        state = decoding.jit_round(engine, params, state)
    for turn in range(2):
        host = jax.device_get(state.replace(keys_B=None))
        said = [row[:n].tolist() for row, n in zip(host.tokens_BxS, host.lengths_B, strict=True)]
        if parting:
            said = [text[: len(text) - b - turn] for b, text in enumerate(said)]
        texts = [[*text, *more] for text, more in zip(said, TURNS[turn:] + TURNS, strict=False)]
        state = resume(engine, params, state, texts, 7, seed=turn)
        fresh = case.prefill(texts, 7)
        ours, theirs = (jax.device_get(s.replace(keys_B=None)) for s in (state, fresh))
        assert_rows_equal(ours, theirs)
        for name in ("lengths_B", "prompts_B", "limits_B", "done_B", "rounds_B"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        state = decoding.run_host(engine, params, state)
        assert new_tokens(jax.device_get(state.replace(keys_B=None))) == fed(target, texts, 7)


# ---- folders -------------------------------------------------------------------------------------


def test_a_saved_drafter_drafts_the_same(case, tmp_path):
    case.drafter.save(tmp_path / "folder")
    loaded = specjax.load_drafter(tmp_path / "folder", case.target)
    assert loaded.definition == case.drafter.definition
    assert jax.tree.structure(loaded.params) == jax.tree.structure(case.drafter.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, case.drafter.params)
    params = case.params | {"drafter": loaded.params}
    state = decoding.run_host(case.engine, params, case.prefill(PROMPTS, LIMITS))
    assert emitted(jax.device_get(state)) == emitted(case.final)


def test_a_folder_for_another_target_is_refused(case, tmp_path):
    case.drafter.save(tmp_path)
    other = toy_target(seed=1)
    with pytest.raises(ValueError, match="another target.*fingerprint"):
        specjax.load_drafter(tmp_path, other)


def test_damaged_folders_are_named(case, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        specjax.load_drafter(tmp_path / "nothing", case.target)
    case.drafter.save(tmp_path)
    config = tmp_path / "config.json"
    record = json.loads(config.read_text())
    config.write_text(json.dumps(record | {"drafter": record["drafter"] | {"layres": 3}}))
    with pytest.raises(ValueError, match="layres"):
        specjax.load_drafter(tmp_path, case.target)
    config.write_text(json.dumps(record)[:-9])
    with pytest.raises(ValueError, match="config.json"):
        specjax.load_drafter(tmp_path, case.target)
    config.write_text(json.dumps(record))
    weights = tmp_path / "model.safetensors"
    assert Checkpoint(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="model.safetensors"):
        specjax.load_drafter(tmp_path, case.target)
    weights.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="safetensors"):
        specjax.load_drafter(tmp_path, case.target)


@pytest.mark.parametrize("name", specjax.drafter_names())
def test_unknown_fields_are_named(target, name):
    with pytest.raises(ValueError, match="layres"):
        specjax.init_drafter(name, target, layres=3)
    with pytest.raises(ValueError, match=f"'{name}' has no field 'layres'"):
        specjax.init_drafter(name, target).with_budget(layres=3)


def test_unknown_names_are_answered_with_the_known_ones(target):
    with pytest.raises(ValueError, match="'faseagle'.*fasteagle"):
        specjax.init_drafter("faseagle", target)


@pytest.mark.parametrize("name", specjax.drafter_names())
def test_definitions_are_hashable_and_hold_no_arrays(name):
    """A drafter is a static argument of the jitted round."""
    from specjax.drafters import DRAFTERS

    one, two = (
        DRAFTERS[name](toy_target().config, **next(iter(VARIANTS.get(name, {"": {}}).values())))
        for _ in range(2)
    )
    assert one == two and hash(one) == hash(two) and one is not two
    assert dataclasses.is_dataclass(one) and one.name == name
