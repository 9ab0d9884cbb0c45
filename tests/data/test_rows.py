"""Rows: a step's batch from nothing but the step, processes' shares, packing without loss."""

import collections

import numpy as np
import pytest

from specjax.data.rows import Rows, first_fit, pack_rows, pad_marked, pad_rows, text_ends


def numbered(count, length=3):
    """Rows of which each holds its own number."""
    tokens = np.repeat(np.arange(count, dtype=np.int32)[:, None], length, axis=1)
    return {"tokens": tokens, "supervised": np.ones((count, length), bool)}


def drawn(rows, steps):
    return np.concatenate([rows.batch(s)["tokens"][:, 0] for s in range(steps)])


def test_every_epoch_is_a_permutation_of_its_own():
    order = drawn(Rows(numbered(7), 4, seed=5), 7)  # four epochs, batches across their borders
    epochs = order.reshape(4, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert (drawn(Rows(numbered(7), 4, seed=6), 7) != order).any()


def test_a_batch_depends_on_the_step_alone():
    """Asked in any order, of any object: what a resumed run needs."""
    first, again = (Rows(numbered(9), 4, seed=2) for _ in range(2))
    forward = [first.batch(s)["tokens"] for s in range(12)]
    for step in reversed(range(12)):
        np.testing.assert_array_equal(again.batch(step)["tokens"], forward[step])
        np.testing.assert_array_equal(again.picks(step), forward[step][:, 0])
    far = 10**9
    np.testing.assert_array_equal(again.picks(far), first.picks(far))


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_processes_share_a_batch_in_order(processes):
    whole = Rows(numbered(11), 8, seed=1, process_index=0, process_count=1)
    parts = [Rows(numbered(11), 8, 1, p, processes) for p in range(processes)]
    for step in range(5):
        shares = [part.batch(step) for part in parts]
        assert {len(share["tokens"]) for share in shares} == {8 // processes}
        for name, array in whole.batch(step).items():
            np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), array)


def test_what_cannot_be_shared_is_named():
    with pytest.raises(ValueError, match="batch_size: 6 rows cannot be shared by 4 processes"):
        Rows(numbered(9), 6, 0, 0, 4)
    with pytest.raises(ValueError, match=r"process_index: 2 must be in \[0, 2\)"):
        Rows(numbered(9), 6, 0, 2, 2)
    with pytest.raises(ValueError, match="9 sequences are fewer than batch_size 10"):
        Rows(numbered(9), 10, 0)


def test_padding_cuts_and_marks():
    rows = pad_rows([([5, 6, 7, 8], 2), ([1] * 9, 3)], 6, supervise_prompt=False)
    assert rows["tokens"].tolist() == [[5, 6, 7, 8, 0, 0], [1] * 6]
    assert rows["supervised"].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]
    marked = pad_marked([([5, 6, 7, 8], [0, 0, 1, 1]), ([1] * 9, [0] * 3 + [1] * 6)], 6)
    assert all((marked[name] == rows[name]).all() for name in rows)
    assert text_ends(rows).tolist() == [4, 6]
    assert pad_rows([([5, 6], 2)], 4, supervise_prompt=True)["supervised"].sum() == 2


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_nothing(seed):
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(40):
        ids = rng.integers(0, 9, rng.integers(1, 14)).tolist()  # token 0 is no padding here
        sequences.append((ids, rng.random(len(ids)) < 0.5))
    rows = pad_marked(sequences, 12)
    packed = pack_rows(rows)
    texts = collections.Counter()
    for ids, marks in sequences:
        marks = np.array(marks[:12])
        if marks.any():
            end = np.flatnonzero(marks)[-1] + 1
            texts[(*ids[:end], *marks[:end].tolist())] += 1
    found = collections.Counter()
    for tokens, marks, segments in zip(
        packed["tokens"], packed["supervised"], packed["segments"], strict=True
    ):
        count = segments.max()
        used = (segments > 0).sum()
        assert (segments == np.sort(segments[:used]).tolist() + [0] * (12 - used)).all()
        assert set(segments[:used]) == set(range(1, count + 1))
        assert not tokens[used:].any() and not marks[used:].any()
        for segment in range(1, count + 1):
            own = segments == segment
            found[(*tokens[own].tolist(), *marks[own].tolist())] += 1
    assert found == texts
    again = pack_rows(rows)
    assert all((again[name] == packed[name]).all() for name in packed)
    assert len(packed["tokens"]) < len(rows["tokens"])


def slow_first_fit(sizes, room):
    bins = []
    for item, size in enumerate(sizes):
        if size == 0:
            continue
        for members in bins:
            if sum(sizes[m] for m in members) + size <= room:
                members.append(item)
                break
        else:
            bins.append([item])
    return bins


def test_first_fit_is_first_fit():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(0, 11, rng.integers(0, 30)).tolist()
        assert first_fit(sizes, 10) == slow_first_fit(sizes, 10)
    with pytest.raises(ValueError, match="an item of 11 does not fit bins of 10"):
        first_fit([3, 11], 10)
