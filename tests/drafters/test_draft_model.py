"""A draft model drafts what it would have written itself, whatever was accepted before."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import PROMPTS, greedy_continuations, random_target, run_recording, toy_target

import specjax
from specjax.data.tokenizer import save_tokenizer, train_bpe
from specjax.drafters import Context
from specjax.drafters.rasd import fused
from specjax.generation import make_engine, start
from specjax.models import transformer
from specjax.models.hf import save_target
from specjax.models.target import Target
from specjax.training.acceptance import (
    _states_and_labels,
    fit_acceptance,
    wants_acceptance_head,
    weighted_loss,
)

DEPTH = 3


@pytest.fixture(scope="module")
def target():
    return toy_target()


@pytest.fixture(scope="module")
def drafter(target):
    """The target itself, a little off: from nothing to everything is accepted."""
    keys = iter(jax.random.split(jax.random.key(0), 99))
    params = jax.tree.map(
        lambda w: w + 0.04 * jax.random.normal(next(keys), w.shape), target.params
    )
    fresh = specjax.init_drafter("draft_model", target, num_layers=3, draft_depth=DEPTH)
    return dataclasses.replace(fresh, params=params)


def test_every_draft_is_the_model_s_own_greedy_continuation(target, drafter):
    """Over rounds of every acceptance length: full forwards of the draft model are the judge."""
    engine, params = make_engine(target, drafter, stop_tokens=())
    state = start(engine, params, PROMPTS, 20)
    _, record = run_recording(engine, params, state)
    model = Target("draft", drafter.definition.model, drafter.params, None)
    redraft = jax.jit(engine.drafter.draft)
    lengths = set()
    for before, after in zip(record, record[1:], strict=False):
        lengths |= set((after.lengths_B - before.lengths_B).tolist())
        context = Context(jnp.asarray(before.tokens_BxS), jnp.asarray(before.lengths_B))
        tree, _ = redraft(drafter.params, target.params, before.drafter, context, None)
        texts = [
            row[:n].tolist() for row, n in zip(before.tokens_BxS, before.lengths_B, strict=True)
        ]
        own = greedy_continuations(model, texts, DEPTH)
        np.testing.assert_array_equal(tree.tokens_T[:, 1:], own)
    assert {1, DEPTH + 1} <= lengths  # nothing accepted, and a whole draft


def test_it_goes_on_from_tokens_that_others_drafted(target, drafter):
    """Inside `rasd`, whose retrieved rows are committed too: still its own greedy continuation."""
    both = fused(drafter, continuation=6, retrieved_nodes=8, min_suffix=1, prune=False)
    engine, params = make_engine(target, both, stop_tokens=())
    _, record = run_recording(engine, params, start(engine, params, PROMPTS, 40))
    model = Target("draft", drafter.definition.model, drafter.params, None)
    inner, beyond = engine.drafter.inner, 0
    redraft = jax.jit(inner.draft)
    for before, after in zip(record, record[1:], strict=False):
        beyond = max(beyond, int((after.lengths_B - before.lengths_B).max()))
        context = Context(jnp.asarray(before.tokens_BxS), jnp.asarray(before.lengths_B))
        tree, _ = redraft(drafter.params, target.params, before.drafter, context, None)
        texts = [
            row[:n].tolist() for row, n in zip(before.tokens_BxS, before.lengths_B, strict=True)
        ]
        np.testing.assert_array_equal(
            tree.tokens_T[:, 1:], greedy_continuations(model, texts, DEPTH)
        )
    assert beyond > DEPTH + 1  # rounds that committed more than it can draft


def test_teaching_aligns_with_drafting(target, drafter):
    tokens = np.random.default_rng(0).integers(12, size=(2, 9)).astype(np.int32)
    definition = drafter.definition
    (hidden,), _ = definition.teach(drafter.params, target.params, None, tokens)
    found = definition.logits(drafter.params, target.params, hidden)
    model = Target("draft", definition.model, drafter.params, None)
    np.testing.assert_allclose(found[:, :-1], model.logits(tokens)[:, 1:], atol=1e-5)


def test_a_folder_of_the_same_vocabulary_drafts(target, tmp_path):
    small = toy_target(seed=3, num_layers=1, hidden_size=8, num_heads=1)
    save_target(tmp_path / "small", small.config, small.params, "float32")
    drafter = specjax.init_drafter("draft_model", target, folder=tmp_path / "small", draft_depth=2)
    assert drafter.definition.model.hidden_size == 8
    plain = specjax.generate(target, PROMPTS, max_new_tokens=12, stop_tokens=())
    assert specjax.generate(target, PROMPTS, drafter, 12, stop_tokens=()).tokens == plain.tokens
    drafter.save(tmp_path / "saved")
    again = specjax.load_drafter(tmp_path / "saved", target)
    assert again.definition == drafter.definition
    jax.tree.map(np.testing.assert_array_equal, again.params, drafter.params)


def test_a_target_drafting_for_itself_is_always_right(target, tmp_path):
    save_target(tmp_path, target.config, target.params, "float32")
    drafter = specjax.init_drafter("draft_model", target, folder=tmp_path, draft_depth=DEPTH)
    out = specjax.generate(target, PROMPTS, drafter, 1 + 3 * (DEPTH + 1), stop_tokens=())
    assert out.accept_lengths == [[1] + 3 * [DEPTH + 1]] * len(PROMPTS)


def test_what_does_not_fit_is_refused_by_name(target, tmp_path):
    other = random_target(num_layers=1)
    save_target(tmp_path / "other", other.config, other.params)
    with pytest.raises(ValueError, match="vocabulary has 61 tokens, the target's 12"):
        specjax.init_drafter("draft_model", target, folder=tmp_path / "other")
    with pytest.raises(ValueError, match="folder: drafter 'eagle3' has no model"):
        specjax.init_drafter("eagle3", target, folder=tmp_path / "other")
    with pytest.raises(ValueError, match="draft_depth"):
        specjax.init_drafter("draft_model", target, draft_depth=0)


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    for name, text in (("ours", "aaaa bbbb abab "), ("theirs", "cccc dddd cdcd ")):
        folder = tmp_path / name
        model = random_target(num_layers=1, vocab_size=300)
        save_target(folder, model.config, model.params)
        save_tokenizer(train_bpe([text * 9], 262), folder, model_max_length=64)
    target = specjax.load_target(tmp_path / "ours")
    specjax.init_drafter("draft_model", target, folder=tmp_path / "ours")
    with pytest.raises(ValueError, match="theirs/tokenizer.json: not the target's vocabulary"):
        specjax.init_drafter("draft_model", target, folder=tmp_path / "theirs")


def test_tokens_that_cannot_be_compared_are_spoken_of(tmp_path):
    model = random_target(num_layers=1, vocab_size=300)
    for name in ("ours", "bare"):
        save_target(tmp_path / name, model.config, model.params)
    save_tokenizer(train_bpe(["aaaa bbbb " * 9], 262), tmp_path / "ours", model_max_length=64)
    target = specjax.load_target(tmp_path / "ours")
    with pytest.warns(UserWarning, match="bare/tokenizer.json: missing; .*300 tokens.*not checked"):
        specjax.init_drafter("draft_model", target, folder=tmp_path / "bare")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specjax.init_drafter("draft_model", target, folder=tmp_path / "ours")


# ---- adaptive length -----------------------------------------------------------------------------


def lengths_of(target, drafter, **stop):
    """Valid tokens of the first draft of each prompt."""
    engine, params = make_engine(target, drafter.with_budget(**stop), stop_tokens=())
    state = start(engine, params, PROMPTS, 20)
    context = Context(state.tokens_BxS, state.lengths_B)
    tree, _ = jax.jit(engine.drafter.draft)(
        params["drafter"], target.params, state.drafter, context, None
    )
    valid = np.asarray(tree.valid_T)
    assert (np.diff(valid.astype(int), axis=1) <= 0).all()  # closed under ancestors
    return valid.sum(axis=1) - 1


def test_a_threshold_out_of_reach_is_a_fixed_length(target, drafter):
    always = lengths_of(target, drafter, draft_depth=5, stop="confidence", threshold=0.0)
    never = lengths_of(
        target, drafter, draft_depth=5, stop="confidence", threshold=1.1, min_depth=2
    )
    assert (always == 5).all() and (never == 2).all()


def test_confidence_stops_after_the_first_doubtful_token(target, drafter):
    model = Target("draft", drafter.definition.model, drafter.params, None)
    for threshold in (0.15, 0.2, 0.3):
        found = lengths_of(target, drafter, draft_depth=5, stop="confidence", threshold=threshold)
        for prompt, length in zip(PROMPTS, found, strict=True):
            text = prompt + specjax.generate(target, [prompt], None, 1).tokens[0]
            expected = 0
            while expected < 5:
                probs = jax.nn.softmax(model.logits(np.array([text]))[0, -1])
                text, expected = [*text, int(probs.argmax())], expected + 1
                if probs.max() < threshold:
                    break
            assert length == expected


@pytest.fixture(scope="module")
def judged(target):
    return specjax.init_drafter("draft_model", target, draft_depth=6, stop="specdec")


def constant_head(drafter, accept):
    """The same drafter with a head that predicts one acceptance whatever it reads."""
    head = jax.tree.map(jnp.zeros_like, drafter.params["buffers"]["acceptance"])
    head["readout"]["bias"] += np.log(accept / (1 - accept))
    buffers = drafter.params["buffers"] | {"acceptance": head}
    return dataclasses.replace(drafter, params=drafter.params | {"buffers": buffers})


@pytest.mark.parametrize("accept", [0.5, 0.8, 0.93])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6])
def test_specdec_stops_when_a_rejection_has_become_likely(target, judged, accept, threshold):
    """1 - a^i over the i tokens that were read; the token drawn meanwhile is kept."""
    found = lengths_of(target, constant_head(judged, accept), threshold=threshold)
    likely = [i for i in range(1, 6) if 1 - accept**i > threshold]
    assert (found == (likely[0] + 1 if likely else 6)).all()


def test_specdec_bounds(target, judged):
    assert (lengths_of(target, judged, threshold=1.0) == 6).all()
    assert (lengths_of(target, judged, threshold=-0.1, min_depth=3) == 3).all()


def test_unknown_policies_and_lengths_are_named(target):
    for fields in (dict(stop="entropy"), dict(min_depth=0), dict(min_depth=5, draft_depth=4)):
        with pytest.raises(ValueError, match=next(iter(fields))):
            specjax.init_drafter("draft_model", target, **fields)


def test_the_head_s_loss_by_hand():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=20), rng.random(20)
    p = 1 / (1 + np.exp(-logits))
    plain = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert float(weighted_loss(logits, labels, 1.0)) == pytest.approx(plain.mean(), rel=1e-5)
    weights = labels + 6 * (1 - labels)
    heavy = -(labels * np.log(p) + 6 * (1 - labels) * np.log(1 - p)).sum() / weights.sum()
    assert float(weighted_loss(logits, labels)) == pytest.approx(heavy, rel=1e-5)


def test_labels_are_the_chance_of_acceptance_at_the_state_that_read_the_token(target, drafter):
    tokens = np.random.default_rng(0).integers(12, size=(2, 9)).astype(np.int32)
    counted = np.ones((2, 9), bool)
    definition, key = drafter.definition, jax.random.key(3)
    rows = {"tokens": tokens, "supervised": counted}
    states, labels, counts = _states_and_labels(
        definition, target.config, drafter.params, target.params, rows, key
    )
    model = Target("draft", definition.model, drafter.params, None)
    p, q = (jax.nn.softmax(m.logits(tokens)) for m in (target, model))
    drawn = jax.random.categorical(jax.random.split(key)[0], jnp.log(q))
    read = tokens.copy()
    for b, t in zip(*np.nonzero(counts), strict=True):
        y = int(drawn[b, t - 1])
        assert labels[b, t] == pytest.approx(min(1.0, float(p[b, t - 1, y] / q[b, t - 1, y])), 1e-4)
        read[b, t] = y
    assert 0.5 < counts[:, 1:].mean() < 1 and not counts[:, 0].any()
    expected = transformer.forward(drafter.params, definition.model, read).hidden_BxTxD
    np.testing.assert_allclose(states, expected, atol=1e-5)


def test_a_fitted_head_knows_a_model_that_is_always_right(target, tmp_path):
    save_target(tmp_path, target.config, target.params, "float32")
    drafter = specjax.init_drafter(
        "draft_model", target, folder=tmp_path, draft_depth=6, stop="specdec", threshold=0.3
    )
    rng = np.random.default_rng(0)
    rows = lambda step: {  # noqa: E731
        "tokens": rng.integers(12, size=(4, 12)), "supervised": np.ones((4, 12), bool),
    }  # fmt: skip
    fitted, loss = fit_acceptance(target, drafter, rows, steps=60, learning_rate=1e-2)
    assert loss < 0.1 and (lengths_of(target, fitted) == 6).all()
    for name in ("embed", "layers"):  # the model itself stays as it was
        jax.tree.map(np.testing.assert_array_equal, fitted.params[name], drafter.params[name])


def test_a_head_that_was_not_fitted_stops_nothing(target, judged):
    assert (lengths_of(target, judged, threshold=0.0) == 6).all()


def test_any_draft_model_is_given_a_head_by_fitting(target):
    rows = lambda step: {  # noqa: E731
        "tokens": np.random.default_rng(step).integers(12, size=(2, 8)),
        "supervised": np.ones((2, 8), bool),
    }  # fmt: skip
    plain = specjax.init_drafter("draft_model", target, num_layers=1, draft_depth=3)
    around = fused(plain, PROMPTS)
    with pytest.raises(ValueError, match="'specdec' needs an acceptance head.*fit_acceptance"):
        specjax.generate(target, PROMPTS, plain.with_budget(stop="specdec"), 4)
    heads = []
    for drafter in (plain, around):
        assert not wants_acceptance_head(drafter)
        fitted, _ = fit_acceptance(target, drafter, rows, steps=2)
        assert wants_acceptance_head(fitted) and not wants_acceptance_head(drafter)
        specjax.generate(target, PROMPTS[:1], fitted, 4)
        heads.append(fitted.params["buffers"]["acceptance"])
    jax.tree.map(np.testing.assert_array_equal, *heads)
    assert fitted.params["buffers"]["corpus"] is around.params["buffers"]["corpus"]
    with pytest.raises(ValueError, match="'prompt_lookup' is no 'draft_model'"):
        fit_acceptance(target, specjax.init_drafter("prompt_lookup", target), rows, 1)
