"""A draft model drafts what it would have written itself, whatever was accepted before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import PROMPTS, greedy_continuations, random_target, run_recording, toy_target

import specjax
from specjax.data.tokenizer import save_tokenizer, train_bpe
from specjax.drafters import Context
from specjax.generation import make_engine, start
from specjax.models.hf import save_target
from specjax.models.target import Target

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
