"""A drafter's folder in any layout: tensors read once each, keys checked, files written whole."""

import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.files import write_safetensors, write_text
from specjax.models.checkpoint import Checkpoint
from specjax.models.config import ModelConfig
from specjax.models.hf import LAYER_WEIGHTS, layer_paths, layer_shapes
from specjax.models.target import Target

DTYPES = ("float32", "bfloat16", "float16")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
EMBEDDING = "embed_tokens.weight"


def refuse(source, key: str, message: str):
    """Raises ValueError naming the file and the key."""
    raise ValueError(f"{source}: {key}: {message}")


def flag(raw: dict[str, Any], source, key: str, default: bool = False) -> bool:
    """A key that is true or false; null counts as absent."""
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, bool):
        refuse(source, key, f"{value!r} is neither true nor false")
    return value


def section(raw: dict[str, Any], source, key: str) -> dict[str, Any]:
    """A nested object; null and absent are empty."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        refuse(source, key, f"{value!r} is not an object")
    return value


def same_as_target(layer: ModelConfig, target: ModelConfig, source) -> None:
    """Refuses the width and the vocabulary of another target, by key."""
    for key in ("hidden_size", "vocab_size"):
        if getattr(layer, key) != getattr(target, key):
            refuse(source, key, f"{getattr(layer, key)}, but the target has {getattr(target, key)}")


def layer_ids(raw: dict[str, Any], source, key: str) -> tuple[int, ...] | None:
    """Three layer numbers as written, or None where the key is absent or null."""
    ids = raw.get(key)
    if ids is None:
        return None
    if not (isinstance(ids, list) and len(ids) == 3 and all(type(i) is int for i in ids)):
        refuse(source, key, f"{ids!r}: three layer numbers are expected")
    return tuple(ids)


def checked_taps(taps: tuple[int, ...], target: ModelConfig, source, key: str) -> tuple[int, ...]:
    """Taps in our convention (layers *entered*) as the field `feature_layers` holds them.

    The number of layers itself is refused: our tap of that number is the LM head's input, other
    programs' what the last layer leaves, before the final norm.

    Raises:
      ValueError: they are not three layers of this target, low to high.
    """
    if taps == target.feature_layers():
        return ()
    low, mid, high = taps
    if not 0 <= low < mid < high < target.num_layers:
        refuse(
            source, key,
            f"the inputs of layers {taps}: not three of a target of {target.num_layers} layers, "
            "low to high",
        )  # fmt: skip
    return taps


def written_taps(definition) -> tuple[int, int, int]:
    """The taps of a feature drafter, where the layouts can say them.

    Raises:
      ValueError: they are not three, or one is the LM head's input (names the field).
    """
    taps = definition.taps
    if len(taps) != 3 or definition.target.num_layers in taps:
        raise ValueError(
            f"feature_layers: {taps}: this layout holds the inputs of exactly three layers"
        )
    return taps


def default_taps(target: ModelConfig) -> tuple[int, int, int]:
    """The layers whose input every reader taps where a config names none."""
    return 2, target.num_layers // 2, target.num_layers - 3


class Tensors(Checkpoint):
    """A checkpoint that knows which of its tensors nobody has read.

    Raises:
      FileNotFoundError: no safetensors; says how to convert a pickle.
      ValueError: truncated, or not safetensors.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        pickles = sorted(p.name for ends in ("*.bin", "*.pt", "*.pth") for p in folder.glob(ends))
        if pickles and not any(folder.glob("*.safetensors*")):
            raise FileNotFoundError(
                f"{folder / WEIGHTS}: missing, and {pickles[0]} is a pickle, which is never "
                "loaded; if you trust it, convert it in its folder with torch: python -c "
                "'import torch, safetensors.torch as s; "
                f'w = torch.load("{pickles[0]}", weights_only=True, map_location="cpu"); '
                f's.save_file({{k: v.clone() for k, v in w.items()}}, "{WEIGHTS}")\''
            )
        super().__init__(folder)
        self._unread = set(self.names)

    def read(self, name, shape, *args):
        array = super().read(name, shape, *args)
        self._unread.discard(name)
        return array

    def read_layer(
        self, prefix: str, config: ModelConfig, in_dim: int | None = None, outputs: int = 1
    ) -> dict[str, Any]:
        """One layer's parameters, on the host, from tensors below `prefix`; see `layer_shapes`."""
        shapes, layer = layer_shapes(config, in_dim, outputs), {}
        for keys in layer_paths(config):
            form, node = LAYER_WEIGHTS[keys], layer
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            parts = (self.read(prefix + name, shapes[name]) for name in form.names)
            node[keys[-1]] = np.asarray(form.fuse(config, *parts))
        return layer

    def finish(self) -> None:
        """Refuses tensors that nothing has read: they belong to a variant that we do not have."""
        if self._unread:
            raise ValueError(
                f"{self.folder}: tensor {min(self._unread)} has no place in the drafter that "
                f"{CONFIG} describes"
            )


def check_embedding(tensors: Tensors, target: Target) -> None:
    """Reads a stored embedding, if there is one, and refuses any but the target's own.

    Both are compared in the coarser of their types, down to float16's smallest step.
    """
    if EMBEDDING not in tensors.names:
        return
    theirs = tensors.read(EMBEDDING, (target.config.vocab_size, target.config.hidden_size))
    ours = np.asarray(target.params["embed"])
    coarser = min((theirs.dtype, ours.dtype), key=lambda t: jnp.finfo(t).nmant)
    theirs, ours = (w.astype(coarser).astype(np.float32) for w in (theirs, ours))
    if np.abs(theirs - ours).max() > 2.0**-24:
        raise ValueError(
            f"{tensors.folder}: {EMBEDDING} is not the target's embedding: made for another "
            "target, or trained, and a drafter here has no embedding of its own"
        )


def as_params(tree):
    """Parameters as read, still on the host: weights in float32, integers as they are."""

    def cast(w):
        return w if np.issubdtype(w.dtype, np.integer) else np.asarray(w, np.float32)

    return jax.tree.map(cast, tree)


def verifier_section(target: ModelConfig, verifier: str | None) -> dict[str, Any]:
    """Names the target in a config. Raises ValueError for what is no hub id: paths are private."""
    if verifier is not None and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", verifier):
        raise ValueError(f"verifier: {verifier!r} is not a hub id such as 'Qwen/Qwen3-0.6B'")
    name = f"{target.model_type.capitalize()}ForCausalLM"
    return {"name_or_path": verifier, "architectures": [name]}


def write_folder(folder, tensors: dict[str, np.ndarray], record: dict[str, Any], dtype: str) -> int:
    """Writes weights, then config.json, each whole or not at all; returns the tensors' count."""
    cast = jnp.dtype(dtype)
    tensors = {
        name: np.ascontiguousarray(w.astype(cast) if jnp.issubdtype(w.dtype, jnp.floating) else w)
        for name, w in tensors.items()
    }
    folder = pathlib.Path(folder)
    write_safetensors(folder / WEIGHTS, tensors)
    write_text(folder / CONFIG, json.dumps(record, indent=2) + "\n")
    return len(tensors)
