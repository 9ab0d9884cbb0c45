"""Drafters as values: a definition with its parameters, made anew or read from a folder."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding import DecodeState
from specjax.drafters import DRAFTERS, Drafter
from specjax.drafters.base import split_buffers
from specjax.files import write_safetensors, write_text
from specjax.interchange import import_drafter, is_foreign
from specjax.models.config import ModelConfig, read_json
from specjax.models.hf import WEIGHT_DTYPES, Checkpoint
from specjax.models.target import Target
from specjax.sharding import MODEL_RULES, Rules, fetch, path_of, place, shardings


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedDrafter:
    """A drafter's static definition with its parameters, tied to one target."""

    definition: Drafter
    params: dict[str, Any]
    fingerprint: str  # of the target it was made for

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def num_params(self) -> int:
        """Trainable parameters."""
        return sum(w.size for w in jax.tree.leaves(split_buffers(self.params)[0]))

    def on(self, mesh, rules: Rules | None = None) -> "TrainedDrafter":
        """The same parameters laid out on a mesh, by its own rules where none are given."""
        rules = (*self.definition.partition, *MODEL_RULES) if rules is None else rules
        params = place(self.params, shardings(mesh, self.params, rules))
        return dataclasses.replace(self, params=params)

    def with_budget(self, **changes) -> "TrainedDrafter":
        """The same parameters drafting another tree (depth, candidates, nodes)."""
        definition = self.definition.with_budget(**changes)
        return dataclasses.replace(self, definition=definition)

    def after(self, state: DecodeState) -> "TrainedDrafter":
        """The drafter after the requests of a finished state, for those that learn from use."""
        params = self.definition.keep(self.params, state.drafter)
        return self if params is self.params else dataclasses.replace(self, params=params)

    def save(self, folder) -> None:
        """Writes config.json and model.safetensors, each whole or not at all."""
        folder = pathlib.Path(folder)
        leaves = jax.tree_util.tree_leaves_with_path(fetch(self.params))
        tensors = {path_of(k).replace("/", "."): v for k, v in leaves}
        write_safetensors(folder / "model.safetensors", tensors)
        record = {
            "format": "specjax",
            "algorithm": self.name,
            "target_fingerprint": self.fingerprint,
            "drafter": {"target": dataclasses.asdict(self.definition.target)}
            | self.definition.plain(),
        }
        write_text(folder / "config.json", json.dumps(record, indent=2) + "\n")


def _family(name: str) -> type[Drafter]:
    if name not in DRAFTERS:
        raise ValueError(f"drafter: {name!r} is unknown; one of {tuple(DRAFTERS)}")
    return DRAFTERS[name]


@functools.partial(jax.jit, static_argnums=0)
def _init(definition: Drafter, key, target_params):
    return definition.init(key, target_params)


def init_drafter(
    name: str, target: Target, seed: int = 0, vocab_ids=None, **config
) -> TrainedDrafter:
    """A fresh drafter for a target, started from the target's weights where shapes allow.

    Args:
      name: one of `drafter_names()`.
      target: the model it drafts for.
      seed: of the random initial weights.
      vocab_ids: target ids of the draft vocabulary, where `draft_vocab_size` asks for one
        (default: the lowest ids).
      **config: fields of the drafter's dataclass, or for a family with a model of its own
        `folder`, from which it is read.

    Raises:
      ValueError: unknown name or field, or a value out of range (names the field).
    """
    if "folder" in config:
        fields, params = _family(name).load(target, config.pop("folder"))
        definition = _family(name).of(target.config, config | fields)
        like = jax.eval_shape(lambda p: definition.init(jax.random.key(0), p), target.params)
        if "buffers" in like:  # what a folder's model does not have
            fresh = _init(definition, jax.random.key(seed), target.params)
            params = params | {"buffers": fresh["buffers"]}
        return _beside(target, TrainedDrafter(definition, params, target.fingerprint))
    definition = _family(name).of(target.config, config)
    params = _init(definition, jax.random.key(seed), target.params)
    if vocab_ids is not None:
        ids = np.sort(np.asarray(vocab_ids, np.int32))
        if ids.shape != (definition.draft_vocab_size,) or len(np.unique(ids)) != len(ids):
            raise ValueError(
                f"vocab_ids: {ids.shape} distinct ids do not fit draft_vocab_size "
                f"{definition.draft_vocab_size}"
            )
        buffers = params.get("buffers", {}) | {"vocab_ids": jnp.asarray(ids)}
        params = params | {"buffers": buffers}
        if "head" in params:
            params["head"] = definition.init_head(target.params, params["buffers"]["vocab_ids"])
    return _beside(target, TrainedDrafter(definition, params, target.fingerprint))


def _beside(target: Target, drafter: TrainedDrafter) -> TrainedDrafter:
    return drafter if target.mesh is None else drafter.on(target.mesh)


def load_drafter(folder, target: Target) -> TrainedDrafter:
    """Reads a drafter that `save` wrote, or another program's EAGLE-3 head (`interchange`).

    Raises:
      FileNotFoundError: no such folder or file.
      ValueError: damaged files, a drafter made for another target, or a foreign head of a kind that
        is not supported (names the key of its config).
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a drafter folder has one")
    record = read_json(path)
    if is_foreign(record):
        return TrainedDrafter(*import_drafter(folder, record, target), target.fingerprint)
    try:
        name = record["algorithm"]
        fields = dict(record["drafter"])
        config = ModelConfig.of(fields.pop("target"))
        definition = _family(name).of(config, fields)
        fingerprint = record["target_fingerprint"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a drafter's config: {error!r}") from error
    if fingerprint != target.fingerprint:
        raise ValueError(
            f"{folder}: made for another target (fingerprint {fingerprint}: "
            f"{config.num_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size}); "
            f"{target.name} has fingerprint {target.fingerprint}"
        )
    like = jax.eval_shape(lambda p: definition.init(jax.random.key(0), p), target.params)
    checkpoint = Checkpoint(folder)

    def read(keys, leaf):
        # Constants (a draft vocabulary's ids) keep their own integer type.
        integer = jnp.issubdtype(leaf.dtype, jnp.integer)
        dtypes = (leaf.dtype.name,) if integer else WEIGHT_DTYPES
        array = checkpoint.read(path_of(keys).replace("/", "."), leaf.shape, dtypes)
        return jnp.asarray(array, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(read, like)
    return _beside(target, TrainedDrafter(definition, params, target.fingerprint))
