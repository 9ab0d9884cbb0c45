"""A drafter that learns while it decodes: what is recorded, when it learns, unchanged output."""

import jax
import numpy as np
import pytest
from toys import greedy_continuations, toy_target

import specjax
from configs.common import loss, optimizer
from specjax.training.online import OnlineTrainer, rejections

PROMPTS = [[1], [2, 3, 4], [5, 1, 8, 2, 6], [6, 7, 1], [9, 9, 2], [0, 4]]
NEW, DEPTH = 12, 2


@pytest.fixture(scope="module")
def target():
    return toy_target()


@pytest.fixture(scope="module")
def drafter(target):
    return specjax.init_drafter("fasteagle", target, num_layers=DEPTH)


def trainer(target, drafter, **changes):
    rates = optimizer(learning_rate=1e-2, warmup_steps=1)
    return OnlineTrainer(target, drafter, rates, loss(), length=20, steps=100, **changes)


def test_records_are_where_the_draft_was_replaced(target, drafter):
    """Against decoding itself: redraft at every round's root and compare with what was emitted."""
    prompt = PROMPTS[2]
    out = specjax.generate(target, [prompt], drafter, NEW, stop_tokens=())
    ids, accepts = prompt + out.tokens[0], out.accept_lengths[0]
    recorded = rejections(len(prompt), accepts, DEPTH, len(ids))
    root, marks = len(prompt), set()
    for emitted in accepts[1:-1]:
        # A fresh decode of the text up to the root gives the same first round.
        again = specjax.generate(target, [ids[:root]], drafter, NEW, stop_tokens=())
        assert again.accept_lengths[0][1] == emitted
        if emitted <= DEPTH:
            marks.add((root - 1, emitted - 1))
        root += emitted
    assert marks and marks == set(zip(*map(np.ndarray.tolist, recorded.nonzero()), strict=True))


def test_nothing_is_recorded_of_whole_drafts_and_cut_rounds():
    recorded = rejections(3, [1, 3, 1, 2, 2], 2, 12)
    # Roots 3, 6, 7, 9: all of the first was accepted, the last may have been cut.
    assert recorded.nonzero()[0].tolist() == [5, 6] and recorded[5, 0] and recorded[6, 1]
    assert not rejections(30, [1, 1, 1, 1], 2, 12).any()  # past what is looked at


def test_it_learns_every_few_requests_and_output_never_changes(target, drafter):
    online = trainer(target, drafter, interval=2)
    start, expected = jax.device_get(drafter.params), greedy_continuations(target, PROMPTS, NEW)
    for index, prompt in enumerate(PROMPTS):
        before = jax.device_get((online.drafter.params, online._state))
        out = online.generate([prompt], max_new_tokens=NEW, stop_tokens=())
        assert out.tokens == [expected[index]]
        after = jax.device_get((online.drafter.params, online._state))
        same = jax.tree.map(np.array_equal, before, after)
        if index % 2 == 0:  # recorded, not flushed: parameters and optimiser bit for bit
            assert all(jax.tree.leaves(same)) and len(online._records) == 1
        else:
            assert not all(jax.tree.leaves(same)) and not online._records
    assert online.updates == 3
    jax.tree.map(np.testing.assert_array_equal, start, jax.device_get(drafter.params))


def test_the_order_of_requests_within_an_update_does_not_matter(target, drafter):
    outs = [specjax.generate(target, [p], drafter, NEW, stop_tokens=()) for p in PROMPTS[:3]]
    answers = [(p, o.tokens[0], o.accept_lengths[0]) for p, o in zip(PROMPTS, outs, strict=False)]
    ends = []
    for order in (answers, answers[::-1]):
        online = trainer(target, drafter, interval=3)
        assert [online.record(*a) for a in order] == [False, False, True]
        ends.append(online.drafter.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)


def test_what_cannot_be_trained_is_refused(target, drafter):
    with pytest.raises(ValueError, match="interval, length: 0, 20"):
        trainer(target, drafter, interval=0)
