"""Safetensors folders: checked by their headers first, then read slice by slice."""

import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from specjax.models.config import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Anything else is quantised, and a plain cast would not undo that.
WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")
_KINDS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}  # I8 is int8
Index = tuple[slice, ...]
_PIECE = 1 << 16  # numbers looked at at once: the answer for each stays in the processor's cache


def _finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite, with no second copy in memory."""
    flat = array.reshape(-1)
    pieces = (flat[i : i + _PIECE] for i in range(0, flat.size, _PIECE))
    return all(np.isfinite(piece).all() for piece in pieces)


class Checkpoint:
    """The tensors of a folder: `model.safetensors`, or the shards that an index names.

    Opening reads headers alone. An index decides where a tensor lies; what it does not name is not
    there.

    Attributes:
      names: tensor name -> the file it lies in.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: a damaged index, a shard that is truncated or not safetensors, or one that lacks a
        tensor which the index places there.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.is_file():
            where = read_json(index).get("weight_map")
            if not (isinstance(where, dict) and all(isinstance(v, str) for v in where.values())):
                raise ValueError(f"{index}: not a safetensors index: weight_map names no shards")
            self._files = {shard: self._open(shard) for shard in sorted(set(where.values()))}
        elif single.is_file():
            self._files = {SINGLE: self._open(SINGLE)}
            where = dict.fromkeys(self._files[SINGLE].keys(), SINGLE)
        else:
            pickles = sorted(p.name for p in self.folder.glob("*.bin"))
            hint = f" ({pickles[0]} is pickle, which is never loaded)" if pickles else ""
            raise FileNotFoundError(
                f"{single}: missing; weights load from safetensors only{hint}; load and save the "
                "model once with transformers, which writes them"
            )
        self.names: dict[str, str] = where
        held = {shard: set(file.keys()) for shard, file in self._files.items()}
        for name, shard in where.items():
            if name not in held[shard]:
                raise ValueError(
                    f"{self.folder / shard}: tensor {name} is missing, though {INDEX} places it "
                    "there"
                )

    def _open(self, shard: str):
        path = self.folder / shard
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, though {INDEX} names it")
        try:
            return safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated or not safetensors: {error}") from error

    def check(self, shapes: Mapping[str, tuple[int, ...]], dtypes=WEIGHT_DTYPES):
        """Refuses, before anything is read, tensors that are absent or not what `shapes` says.

        Raises:
          ValueError: names the file and the tensor.
        """
        for name, shape in shapes.items():
            if name not in self.names:
                source = INDEX if set(self._files) != {SINGLE} else SINGLE
                raise ValueError(f"{self.folder / source}: tensor {name} is missing")
            path = self.folder / self.names[name]
            header = self._files[self.names[name]].get_slice(name)
            if tuple(header.get_shape()) != tuple(shape):
                raise ValueError(
                    f"{path}: {name} has shape {tuple(header.get_shape())}, config.json asks "
                    f"{tuple(shape)}"
                )
            if self.dtype(name) not in dtypes:
                raise ValueError(
                    f"{path}: {name} has dtype {self.dtype(name)}; one of {dtypes} is expected"
                )

    def dtype(self, name: str) -> str:
        """NumPy's name of a tensor's dtype; the file's own for those that NumPy lacks."""
        stored = self._files[self.names[name]].get_slice(name).get_dtype()
        kind = stored.rstrip("0123456789")
        return _KINDS[kind] + stored[len(kind) :] if kind in _KINDS else stored.lower()

    def read(
        self, name: str, shape: tuple[int, ...], dtypes=WEIGHT_DTYPES, index: Index | None = None
    ) -> np.ndarray:
        """One tensor, or the slices `index` of its axes: no other bytes are copied.

        Raises:
          ValueError: as `check`, or a number that is not finite.
        """
        self.check({name: shape}, dtypes)
        file = self._files[self.names[name]]
        array = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        if not _finite(array):
            raise ValueError(f"{self.folder / self.names[name]}: {name} holds NaN or infinity")
        return array

    def put(self, name: str, shape: tuple[int, ...], sharding: Sharding | None = None) -> jax.Array:
        """One tensor on its devices, each reading its own slice when its turn comes.

        The host holds one slice at a time, and a slice that several devices want is read once;
        `jax.make_array_from_callback` would read it for each and hold all of them.

        Args:
          name, shape: as for `read`.
          sharding: None is the default device, to which the array is not committed.
        """
        if sharding is None:
            return jax.block_until_ready(jnp.asarray(self.read(name, shape)))
        holders: dict[tuple, list] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        arrays = []
        for bounds, devices in holders.items():
            host = self.read(name, shape, index=tuple(slice(*b) for b in bounds))
            # Waiting lets go of this slice before the next one is read.
            arrays += jax.block_until_ready([jax.device_put(host, device) for device in devices])
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
