"""Training rows of one length: padded or packed texts, and the batch of every step.

Rows are a dict of arrays with a leading row axis: `tokens` RxT int32, `supervised` RxT bool (tokens
whose prediction is trained) and, where a row holds several texts, `segments` RxT int32.
"""

from collections.abc import Sequence

import grain
import jax
import numpy as np

from specjax.progress import say


def pad_rows(
    sequences: Sequence[tuple[list[int], int]], length: int, supervise_prompt: bool
) -> dict[str, np.ndarray]:
    """Rows of (token ids, prompt length), cut or padded to `length`: one a row."""
    marked = [
        (ids, np.arange(len(ids)) >= (0 if supervise_prompt else prompt))
        for ids, prompt in sequences
    ]
    return pad_marked(marked, length)


def pad_marked(
    sequences: Sequence[tuple[list[int], Sequence[bool]]], length: int
) -> dict[str, np.ndarray]:
    """Rows of (token ids, which of them are supervised), cut or padded to `length`: one a row.

    How many were cut is said.
    """
    if cut := sum(len(ids) > length for ids, _ in sequences):
        say(f"data: {cut} of {len(sequences)} sequences cut to {length} tokens")
    tokens = np.zeros((len(sequences), length), np.int32)
    supervised = np.zeros((len(sequences), length), bool)
    for row, mask, (ids, marks) in zip(tokens, supervised, sequences, strict=True):
        row[: len(ids)], mask[: len(ids)] = ids[:length], marks[:length]
    return {"tokens": tokens, "supervised": supervised}


def pack_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The texts of padded rows in as few rows as first fit finds, with `segments`.

    A text ends at its last supervised token, since nothing learns from what follows, and a row
    without one holds no text. `segments` numbers the texts of a row from 1; 0 is padding.
    """
    length = rows["tokens"].shape[1]
    ends = text_ends(rows)
    bins = first_fit(ends, length)
    packed = {name: np.zeros((len(bins), length), array.dtype) for name, array in rows.items()} | {
        "segments": np.zeros((len(bins), length), np.int32)
    }
    for r, members in enumerate(bins):
        start = 0
        for segment, member in enumerate(members, start=1):
            place, own = slice(start, start + ends[member]), slice(ends[member])
            for name, array in rows.items():
                packed[name][r, place] = array[member, own]
            packed["segments"][r, place] = segment
            start += ends[member]
    say(
        f"data: {np.count_nonzero(ends)} texts packed in {len(bins)} rows of {length} tokens, "
        f"{ends.sum() / max(len(bins) * length, 1):.0%} full; {np.sum(ends == 0)} with nothing to "
        "learn left out"
    )
    return packed


def text_ends(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Of each padded row: one past its last supervised token, 0 where there is none."""
    places = np.arange(1, rows["tokens"].shape[1] + 1)
    return (rows["supervised"] * places).max(axis=1, initial=0)


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Bins of item indices: each item, in order, in the first bin with room; items of 0 in none.

    Raises:
      ValueError: an item larger than a bin.
    """
    if max(sizes, default=0) > room:
        raise ValueError(f"first_fit: an item of {max(sizes)} does not fit bins of {room}")
    bins: list[list[int]] = []
    left = np.full(len(sizes), room)  # of each bin, the next one to open included
    for item, size in enumerate(sizes):
        if size:
            first = int(np.argmax(left[: len(bins) + 1] >= size))
            if first == len(bins):
                bins.append([])
            bins[first].append(item)
            left[first] -= size
    return bins


class Rows:
    """Batches of rows, reshuffled every epoch; a pure function of the step and the seed.

    With several processes each makes its own part of a batch: rows p*B/P.. of process p, which
    together are the batch of one process.
    """

    def __init__(
        self,
        rows: dict[str, np.ndarray],
        batch: int,
        seed: int,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        """`batch` rows are made by all processes together; the processes are JAX's if not given.

        Raises:
          ValueError: fewer rows than a batch takes, or one that the processes cannot share.
        """
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        self.rows, self.count, self.seed = rows, len(rows["tokens"]), seed
        if self.count < batch:
            raise ValueError(f"data: {self.count} sequences are fewer than batch_size {batch}")
        if batch % count:
            raise ValueError(f"batch_size: {batch} rows cannot be shared by {count} processes")
        if not 0 <= index < count:
            raise ValueError(f"process_index: {index} must be in [0, {count})")
        self.size, self.shared = batch // count, count > 1
        order = grain.MapDataset.source(range(self.count)).seed(seed).shuffle().repeat()
        self._parts, self._first, self._stride = order.batch(self.size), index, count

    def picks(self, step: int) -> np.ndarray:
        """int[size]: which rows this process takes at a step."""
        return self._parts[step * self._stride + self._first]

    def batch(self, step: int, drafter=None) -> dict[str, np.ndarray]:
        """This process's rows of one step, whatever the drafter has become."""
        picks = self.picks(step)
        return {name: array[picks] for name, array in self.rows.items()}
