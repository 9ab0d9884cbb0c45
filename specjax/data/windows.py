"""Fixed-length training windows of a token stream, addressed by step: exact resume for free."""

import functools

import numpy as np


class Windows:
    """Windows of `length` tokens; every epoch shifts and shuffles them anew.

    `batch(step, size)` is a pure function of its arguments and the seed.

    Raises:
      ValueError: the stream is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int = 0):
        if len(tokens) < 2 * length:
            raise ValueError(f"{len(tokens)} tokens are too few for windows of {length}")
        self.tokens, self.length, self.seed = tokens, length, seed
        self.per_epoch = len(tokens) // length - 1

    @functools.lru_cache(maxsize=2)  # noqa: B019  (lives as long as the run)
    def _epoch(self, epoch: int):
        rng = np.random.default_rng((self.seed, epoch))
        return rng.integers(self.length), rng.permutation(self.per_epoch)

    def window(self, index: int) -> np.ndarray:
        """The index-th window ever drawn."""
        epoch, place = divmod(index, self.per_epoch)
        shift, order = self._epoch(epoch)
        start = shift + order[place] * self.length
        return self.tokens[start : start + self.length]

    def batch(self, step: int, size: int) -> np.ndarray:
        """Windows step*size .. step*size+size-1 as one [size, length] int32 array."""
        return np.stack([self.window(step * size + j) for j in range(size)]).astype(np.int32)
