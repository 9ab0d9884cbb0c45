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
from specjax.drafters.base import join_buffers, split_buffers
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
        layout = _layout(self.definition, mesh, self.params, rules)
        return dataclasses.replace(self, params=place(self.params, layout))

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


def _layout(definition: Drafter, mesh, params, rules: Rules | None = None):
    """Shardings of a drafter's parameters (arrays or shapes); its own rules if none are given."""
    rules = (*definition.partition, *MODEL_RULES) if rules is None else rules
    return shardings(mesh, params, rules)


def _fresh(definition: Drafter, key, target_params, vocab_ids_W):
    params = definition.init(key, target_params)
    if vocab_ids_W is not None:
        params, buffers = split_buffers(params)
        params = join_buffers(params, buffers | {"vocab_ids": vocab_ids_W})
        if "head" in params:
            params["head"] = definition.init_head(target_params, vocab_ids_W)
    return params


def _init(definition: Drafter, target: Target, seed: int, vocab_ids_W=None):
    """Fresh parameters where they are to lie: on a mesh, no device ever holds them whole."""
    args, layout = (jax.random.key(seed), target.params, vocab_ids_W), None
    if target.mesh is not None:
        shapes = jax.eval_shape(functools.partial(_fresh, definition), *args)
        layout = _layout(definition, target.mesh, shapes)
    return jax.jit(_fresh, static_argnums=0, out_shardings=layout)(definition, *args)


def init_drafter(
    name: str, target: Target, seed: int = 0, vocab_ids=None, **config
) -> TrainedDrafter:
    """A fresh drafter for a target, started from the target's weights where shapes allow.

    Args:
      name: one of `drafter_names()`.
      target: the model it drafts for.
      seed: of the random initial weights.
      vocab_ids: target ids of the draft vocabulary, where `draft_vocab_size` asks for one
        (default: the lowest ids); a model read from a folder has none.
      **config: fields of the drafter's dataclass, or for a family with a model of its own
        `folder`, from which it is read.

    Raises:
      ValueError: unknown name or field, or a value out of range (names the field).
    """
    if "folder" in config:
        if vocab_ids is not None:
            raise ValueError("vocab_ids: a model that is read from a folder keeps its vocabulary")
        fields, params = _family(name).load(target, config.pop("folder"))
        definition = _family(name).of(target.config, config | fields)
        like = jax.eval_shape(lambda p: definition.init(jax.random.key(0), p), target.params)
        if "buffers" in like:  # what a folder's model does not have
            params = params | {"buffers": _init(definition, target, seed)["buffers"]}
        return _beside(target, definition, params)
    definition = _family(name).of(target.config, config)
    if vocab_ids is not None:
        vocab_ids = np.sort(np.asarray(vocab_ids, np.int32))
        size = getattr(definition, "draft_vocab_size", 0)
        if vocab_ids.shape != (size,) or len(np.unique(vocab_ids)) != size:
            raise ValueError(
                f"vocab_ids: {vocab_ids.shape} distinct ids do not fit draft_vocab_size {size}"
            )
    return _beside(target, definition, _init(definition, target, seed, vocab_ids))


def _beside(target: Target, definition: Drafter, params) -> TrainedDrafter:
    """The drafter, its arrays (of the host or of devices) laid out where the target's are."""
    if target.mesh is None:
        params = jax.tree.map(jnp.asarray, params)
    drafter = TrainedDrafter(definition, params, target.fingerprint)
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
        return _beside(target, *import_drafter(folder, record, target))
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
        return array.astype(leaf.dtype)

    return _beside(target, definition, jax.tree_util.tree_map_with_path(read, like))
