"""Who writes the training text: shares, purity over resumes, and what the drafter wrote."""

import dataclasses

import numpy as np
import pytest
from toys import toy_target

import specjax
from specjax.data.rows import Rows, pad_rows
from specjax.training.sources import OwnRows, Writing, write

PROMPTS = [[1 + i, 2, 3 + i] for i in range(6)]
HOW = Writing(share=0.5, refresh=3, temperature=1.0, max_new_tokens=6, batch=4)


@pytest.fixture(scope="module")
def target():
    return toy_target()


@pytest.fixture(scope="module")
def drafters(target):
    return [specjax.init_drafter("draft_model", target, seed, draft_depth=2) for seed in (0, 1)]


def given():
    return Rows(pad_rows([(p + [9] * 5, 3) for p in PROMPTS], 12, True), 2, seed=0)


def own_rows(target, folder, **changes):
    how = dataclasses.replace(HOW, **changes)
    return OwnRows(given(), PROMPTS, target, how, True, folder)


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_share_of_none_never_writes_and_of_all_always(target, drafters, tmp_path):
    never = own_rows(target, tmp_path / "a", share=0.0)
    assert all(same(never.batch(s, drafters[0]), given().batch(s)) for s in range(9))
    assert not (tmp_path / "a").exists()
    always = own_rows(target, tmp_path / "b", share=1.0)
    for step in range(4):
        batch, plain = always.batch(step, drafters[0]), given().batch(step)
        np.testing.assert_array_equal(batch["tokens"][:, :3], plain["tokens"][:, :3])
        assert not (batch["tokens"][:, 3:8] == 9).all(axis=1).any()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["0.npz", "1.npz"]


def test_a_mix_is_rows_of_both_kinds(target, drafters, tmp_path):
    rows = own_rows(target, tmp_path)
    shares = [rows.own(step) for step in range(200)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
    for step in range(6):
        batch, plain = rows.batch(step, drafters[0]), given().batch(step)
        for b, own in enumerate(rows.own(step)):
            assert (batch["tokens"][b] == plain["tokens"][b]).all() != own


def test_text_stays_what_it_was_until_the_next_writing(target, drafters, tmp_path):
    """A resumed run reads what the interrupted one wrote, whatever the drafter has become."""
    first = [own_rows(target, tmp_path, share=1.0).batch(s, drafters[0]) for s in range(3)]
    resumed = own_rows(target, tmp_path, share=1.0)
    assert all(same(resumed.batch(s, drafters[1]), first[s]) for s in range(3))
    other = [
        own_rows(target, tmp_path / d.definition.name / str(i), share=1.0).batch(0, d)
        for i, d in enumerate(drafters)
    ]
    assert not same(*other) and same(other[0], first[0])


def test_at_temperature_zero_a_chain_is_the_draft_models_own_argmax(target, drafters):
    """Of depth + 1 tokens, the drafter wrote all but the target's one, in the order it says."""
    how = dataclasses.replace(HOW, temperature=0.0, max_new_tokens=7)
    drafter = drafters[0]
    alone = dataclasses.replace(target, config=drafter.definition.model, params=drafter.params)
    (ids, size), *_ = write(target, drafter, PROMPTS, how, seed=0)
    for place in range(size, len(ids)):  # the prompt's continuation starts with the target's token
        writer = target if (place - size) % 3 == 0 else alone
        following = specjax.generate(writer, [ids[:place]], None, 1).tokens[0][0]
        assert ids[place] == following


def test_bad_settings_are_named(target, tmp_path):
    with pytest.raises(ValueError, match="own_share: 1.5"):
        own_rows(target, tmp_path, share=1.5)
    with pytest.raises(ValueError, match="refresh: 0"):
        own_rows(target, tmp_path, refresh=0)
    with pytest.raises(ValueError, match="prompts: 1 for 6 rows"):
        OwnRows(given(), PROMPTS[:1], target, HOW, True, tmp_path)
    part = Rows(given().rows, 2, 0, process_index=1, process_count=2)
    with pytest.raises(ValueError, match="rows: whole batches expected"):
        OwnRows(part, PROMPTS, target, HOW, True, tmp_path)
