"""Who writes the text that a drafter learns on: the target, people, the drafter itself, or both.

Source: DistillSpec (arXiv 2310.08461), which compares the four. Whoever wrote a text, the teacher
on it is the target, and no gradient flows through the writing.

Ours: the drafter writes by decoding unverified, so of every N + 1 tokens the last is the target's,
without which a drafter that reads the target's features has nothing to go on. It writes anew every
`refresh` steps, on disk first, so that a resumed run trains on the same rows. A mix is drawn row by
row (GKD: step by step).
"""

import dataclasses
import pathlib

import numpy as np

from specjax import processes
from specjax.data.regenerate import by_length, continued
from specjax.data.rows import Rows, pad_rows
from specjax.files import write_npz
from specjax.generation import make_engine
from specjax.models.target import Target
from specjax.progress import say
from specjax.sampling import Sampling
from specjax.trained import TrainedDrafter
from specjax.verification import get_rule

SOURCES = ("target", "text", "drafter", "mix")


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a drafter writes; `share` of the rows are its own.

    Attributes:
      share: in [0, 1]; the other rows stay as they are given.
      refresh: steps between two writings, at least 1.
      temperature: that tokens are drawn at.
      max_new_tokens, batch: of one decoding run.
    """

    share: float
    refresh: int
    temperature: float
    max_new_tokens: int
    batch: int

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"own_share: {self.share} must be in [0, 1]")
        if self.refresh < 1:
            raise ValueError(f"refresh: {self.refresh} must be at least 1 step")


def write(target: Target, drafter: TrainedDrafter, prompts, how: Writing, seed: int) -> list:
    """Each prompt continued by the drafter: (token ids, prompt length)."""
    rule = get_rule("unverified", draw="with_replacement" if how.temperature > 0 else "top")
    engine, params = make_engine(target, drafter, Sampling(how.temperature), rule=rule)
    written: list = [None] * len(prompts)
    for g, members in enumerate(by_length(prompts, how.batch)):
        rows = [prompts[i] for i in members]
        new = continued(engine, params, rows, how.max_new_tokens, seed + g, how.batch)
        for i, tokens in zip(members, new, strict=True):
            written[i] = (prompts[i] + tokens, len(prompts[i]))
    return written


class OwnRows:
    """The batches of `rows` with a share of their rows written by the drafter in training.

    A pure function of the step and of what the drafter was at the step's last refresh, which is
    kept in `folder`.
    """

    def __init__(
        self, rows: Rows, prompts: list[list[int]], target: Target, how: Writing,
        supervise_prompt: bool, folder,
    ):  # fmt: skip
        """`prompts[i]` is what row i of `rows` continues; `rows` are whole batches.

        All processes write together, so each must know the rows of all.
        """
        if rows.shared:
            raise ValueError("rows: whole batches expected, not one process's part of them")
        if len(prompts) != rows.count:
            raise ValueError(f"prompts: {len(prompts)} for {rows.count} rows")
        self.rows, self.prompts, self.target, self.how = rows, prompts, target, how
        self.supervise_prompt, self.folder = supervise_prompt, pathlib.Path(folder)
        self._current: tuple[int, dict] = (-1, {})

    def own(self, step: int) -> np.ndarray:
        """bool[batch]: which rows of a step the drafter writes."""
        draws = np.random.default_rng((self.rows.seed, 1, step)).random(self.rows.size)
        return draws < self.how.share

    def batch(self, step: int, drafter: TrainedDrafter | None = None) -> dict[str, np.ndarray]:
        """One step's rows; `drafter` is read where text is due that is not on disk yet."""
        batch = {name: array.copy() for name, array in self.rows.batch(step).items()}
        own = self.own(step)
        if drafter is None or not own.any():
            return batch
        places, written = self._written(step // self.how.refresh, drafter)
        for b in np.flatnonzero(own):
            place = np.searchsorted(places, self.rows.picks(step)[b])
            for name in ("tokens", "supervised"):
                batch[name][b] = written[name][place]
        return batch

    def _written(self, time: int, drafter) -> tuple[np.ndarray, dict]:
        """(sorted row indices, their rows) of the time-th writing."""
        if self._current[0] == time:
            return self._current[1]
        path = self.folder / f"{time}.npz"
        if not processes.first(path.is_file):
            steps = range(time * self.how.refresh, (time + 1) * self.how.refresh)
            places = sorted({p for s in steps for p in self.rows.picks(s)[self.own(s)]})
            prompts = [self.prompts[p] for p in places]
            seed = self.rows.seed + 1000 * time
            sequences = write(self.target, drafter, prompts, self.how, seed)
            length = self.rows.rows["tokens"].shape[1]
            rows = pad_rows(sequences, length, self.supervise_prompt)
            processes.first(lambda: write_npz(path, places=places, **rows))
            say(f"data: {len(places)} sequences written by the drafter")
            self._current = (time, (np.array(places), rows))
            return self._current[1]
        stored = processes.together(lambda: _read(path))
        self._current = (time, (stored.pop("places"), stored))
        return self._current[1]


def _read(path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)
