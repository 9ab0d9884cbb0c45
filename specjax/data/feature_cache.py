"""The target's features of training rows, written to disk once and read instead of its forward.

Of every row: the LM head's input and the tapped features, in the target's own dtype, so that
training on what is read is training on what would be computed. A cache costs

    rows * T * (inner taps * D + D) * bytes of a number

which is more than people expect (32 KiB a token at D 4096 and three taps in bfloat16): it is said,
and refused where the disk cannot hold it, before anything is written.

A cache is a folder named by its key (the target's weights and dtype, the rows, the taps) of
safetensors shards, each whole or absent: an interrupted run goes on at the first that is missing.
"""

import functools
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
from safetensors import safe_open

from specjax.data.rows import Rows
from specjax.files import write_safetensors
from specjax.models import transformer
from specjax.models.target import Target
from specjax.progress import progress, say
from specjax.sharding import fetch

FIELD = "train.cache_features"
SHARD_BYTES = 1 << 30
OPEN_SHARDS = 64
SPARE = 0.05  # of the disk's free bytes, left alone


_features = jax.jit(transformer.text_features, static_argnames=("config", "taps"))


def cache_bytes(config, rows: int, length: int, taps: tuple[int, ...], itemsize: int) -> int:
    """Bytes of the features of `rows` rows of `length` tokens; the last tap is the hidden state."""
    inner = sum(tap < config.num_layers for tap in taps)
    return rows * length * (inner + 1) * config.hidden_size * itemsize


class FeatureCache:
    """Features of every row of a set, by row index."""

    def __init__(
        self, folder, target: Target, taps: tuple[int, ...], rows: dict[str, np.ndarray], batch: int
    ):
        """Opens the cache of these rows under `folder`, computing `batch` rows at a time what it
        lacks.

        Raises:
          ValueError: the disk cannot hold it, several processes would have to write it, or a shard
            is not what was written (names the file).
        """
        self.target, self.taps, self.rows = target, tuple(taps), rows
        self.inner = tuple(tap for tap in self.taps if tap < target.config.num_layers)
        self.count, self.length = rows["tokens"].shape
        self.dtype = target.params["embed"].dtype
        row_bytes = self._bytes(1)
        self.shard_rows = max(1, SHARD_BYTES // row_bytes)
        self.folder = pathlib.Path(folder) / self._key()
        shards = range(math.ceil(self.count / self.shard_rows))
        self._fill([i for i in shards if not self._path(i).is_file()], batch)
        self._opened = functools.lru_cache(OPEN_SHARDS)(self._open)
        for shard in shards:
            self._opened(shard)  # checked now, not in the middle of training

    def batch(self, picks) -> dict[str, np.ndarray]:
        """{"hidden": BxTxD, "taps": BxTxM} of these rows, host arrays."""
        read = [self._row(*divmod(int(pick), self.shard_rows)) for pick in picks]
        return {name: np.concatenate([row[name] for row in read]) for name in read[0]}

    def _bytes(self, rows: int) -> int:
        itemsize = self.dtype.itemsize
        return cache_bytes(self.target.config, rows, self.length, self.taps, itemsize)

    def _key(self) -> str:
        digest = hashlib.sha256(json.dumps([self.inner, str(self.dtype)]).encode())
        for name in sorted(self.rows.keys() & {"tokens", "segments"}):
            digest.update(name.encode() + self.rows[name].tobytes())
        # Fine-tuned models share many weights: some of every matrix must be looked at.
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.target.params):
            corner = leaf[tuple(slice(None, 4) for _ in leaf.shape)]
            digest.update(str(path).encode() + fetch(corner).astype(np.float32).tobytes())
        return f"{self.target.fingerprint}-{digest.hexdigest()[:16]}"

    def _path(self, shard: int) -> pathlib.Path:
        return self.folder / f"features-{shard:05d}.safetensors"

    def _members(self, shard: int) -> range:
        first = shard * self.shard_rows
        return range(first, min(first + self.shard_rows, self.count))

    # ---- writing -----------------------------------------------------------------------------

    def _fill(self, missing: list[int], batch: int):
        if not missing:
            say(f"features: {self.count} rows read from {self.folder}")
            return
        if jax.process_count() > 1:
            raise ValueError(
                f"{FIELD}: {self.folder} lacks {len(missing)} shards, and one process must write "
                "them: run with a single process first"
            )
        needed = self._bytes(sum(len(self._members(i)) for i in missing))
        say(
            f"features: {_size(self._bytes(self.count))} of disk for {self.count} rows of "
            f"{self.length} tokens, {_size(needed)} of them still to write"
        )
        free = shutil.disk_usage(_existing(self.folder)).free * (1 - SPARE)
        if needed > free:
            raise ValueError(
                f"{FIELD}: {self.folder} needs {_size(needed)}, the disk has {_size(int(free))} to "
                f"spare; '' runs the target instead"
            )
        with progress("features", len(missing)) as advance:
            for shard in missing:
                write_safetensors(self._path(shard), self._computed(self._members(shard), batch))
                advance()

    def _computed(self, members: range, batch: int) -> dict[str, np.ndarray]:
        """The features of some rows; each batch has `batch` rows, the last one repeats its own."""
        parts = []
        for start in range(members.start, members.stop, batch):
            picks = np.minimum(np.arange(start, start + batch), members.stop - 1)
            given = [self.rows[name][picks] for name in ("tokens", "segments") if name in self.rows]
            out = _features(self.target.params, self.target.config, self.inner, *given)
            kept = min(batch, members.stop - start)
            parts.append({name: np.asarray(array)[:kept] for name, array in out.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    # ---- reading -----------------------------------------------------------------------------

    def _open(self, shard: int):
        """A shard that is read row by row, checked against what it must hold."""
        path, rows = self._path(shard), len(self._members(shard))
        D = self.target.config.hidden_size
        expected = {"hidden": [rows, self.length, D]}
        if self.inner:
            expected["taps"] = [rows, self.length, len(self.inner) * D]
        try:
            file = safe_open(path, framework="numpy")
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors' own kinds
            raise ValueError(f"{path}: not a safetensors file ({error}); remove it") from error
        if found != expected:
            raise ValueError(f"{path}: holds {found}, {expected} expected; remove it")
        return file

    def _row(self, shard: int, place: int) -> dict[str, np.ndarray]:
        file = self._opened(shard)
        read = lambda name: file.get_slice(name)[place : place + 1]  # noqa: E731
        hidden = read("hidden")
        if not self.taps:
            return {"hidden": hidden}
        pieces = np.split(read("taps"), len(self.inner), axis=-1) if self.inner else []
        entering = dict(zip(self.inner, pieces, strict=True)) | {
            self.target.config.num_layers: hidden
        }
        return {
            "hidden": hidden,
            "taps": np.concatenate([entering[tap] for tap in self.taps], axis=-1),
        }


def with_features(stream: Rows, cache: FeatureCache) -> Callable:
    """`stream.batch` with the features of its rows; `cache` is of the same rows."""

    def batch(step: int, drafter=None) -> dict:
        return stream.batch(step) | {"features": cache.batch(stream.picks(step))}

    return batch


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
