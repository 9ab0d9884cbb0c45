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
from specjax.interchange.folder import section
from specjax.models.checkpoint import INDEX, SINGLE, WEIGHT_DTYPES, Checkpoint
from specjax.models.config import ModelConfig, read_json
from specjax.models.target import Target
from specjax.sampling import seed_key
from specjax.sharding import Rules, drafter_rules, fetch, path_of, place, shardings

FORMAT = "specjax"  # what config.json of a drafter of ours says
# What may differ between a target and the record of it: nothing is computed from these.
_ASIDE = {"model_type", "max_position_embeddings", "bos_token_id", "eos_token_ids"}


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
        """Writes config.json and model.safetensors, each whole or not at all.

        Raises:
          FileExistsError: the folder holds something else than a drafter that `save` wrote.
        """
        folder = pathlib.Path(folder)
        _check_ours(folder)
        leaves = jax.tree_util.tree_leaves_with_path(fetch(self.params))
        tensors = {path_of(k).replace("/", "."): v for k, v in leaves}
        write_safetensors(folder / "model.safetensors", tensors)
        record = {
            "format": FORMAT,
            "algorithm": self.name,
            "target_fingerprint": self.fingerprint,
            "drafter": {"target": dataclasses.asdict(self.definition.target)}
            | self.definition.plain(),
        }
        write_text(folder / "config.json", json.dumps(record, indent=2) + "\n")


def _check_ours(folder: pathlib.Path) -> None:
    """Refuses a folder of another kind: its files would be lost, or read in place of ours."""
    config, index = folder / "config.json", folder / INDEX
    if index.exists():
        raise FileExistsError(f"{index}: the folder holds another model; a drafter has no index")
    if config.exists() and read_json(config).get("format") != FORMAT:
        raise FileExistsError(f"{config}: the folder holds another model, not a drafter of ours")


def _family(name: str) -> type[Drafter]:
    if name not in DRAFTERS:
        raise ValueError(f"drafter: {name!r} is unknown; one of {tuple(DRAFTERS)}")
    return DRAFTERS[name]


def _layout(definition: Drafter, mesh, params, rules: Rules | None = None):
    """Shardings of a drafter's parameters (arrays or shapes); its own rules if none are given."""
    rules = drafter_rules(definition.partition) if rules is None else rules
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
    args, layout = (seed_key(seed), target.params, vocab_ids_W), None
    if target.mesh is not None:
        shapes = jax.eval_shape(functools.partial(_fresh, definition), *args)
        layout = _layout(definition, target.mesh, shapes)
    return jax.jit(_fresh, static_argnums=0, out_shardings=layout)(definition, *args)


def init_drafter(
    name: str, target: Target, seed: int = 0, vocab_ids=None, **config
) -> TrainedDrafter:
    """A fresh drafter for a target: its norm and head start as the target's, its layers at random.

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
        size, V = getattr(definition, "draft_vocab_size", 0), target.config.vocab_size
        vocab_ids = _checked_ids(np.sort(np.asarray(vocab_ids)), V, "vocab_ids")
        if vocab_ids.shape != (size,) or len(np.unique(vocab_ids)) != size:
            raise ValueError(
                f"vocab_ids: {vocab_ids.shape} distinct ids do not fit draft_vocab_size {size}"
            )
    return _beside(target, definition, _init(definition, target, seed, vocab_ids))


def _checked_ids(ids_W, vocab_size: int, source: str):
    """A draft vocabulary's ids as int32; ValueError, naming `source`, for what are no token ids."""
    ids_W = np.asarray(ids_W)
    if not np.issubdtype(ids_W.dtype, np.integer):
        raise ValueError(f"{source}: whole numbers are expected, not {ids_W.dtype}")
    outside = ids_W[(ids_W < 0) | (ids_W >= vocab_size)]
    if outside.size:
        raise ValueError(f"{source}: {outside[0]} is outside the vocabulary of {vocab_size}")
    return ids_W.astype(np.int32)


def _beside(target: Target, definition: Drafter, params) -> TrainedDrafter:
    """The drafter, its arrays (of the host or of devices) laid out where the target's are."""
    if target.mesh is None:
        params = jax.tree.map(jnp.asarray, params)
    drafter = TrainedDrafter(definition, params, target.fingerprint)
    return drafter if target.mesh is None else drafter.on(target.mesh)


def load_drafter(folder, target: Target) -> TrainedDrafter:
    """Reads a drafter that `save` wrote, or one in another program's layout (`interchange`).

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
    definition, fingerprint = _read_record(path, record)
    if fingerprint != target.fingerprint:
        made_for = definition.target
        raise ValueError(
            f"{folder}: made for another target (fingerprint {fingerprint}: {made_for.num_layers} "
            f"layers of {made_for.hidden_size}, vocabulary {made_for.vocab_size}); {target.name} "
            f"has fingerprint {target.fingerprint}"
        )
    for field in sorted({f.name for f in dataclasses.fields(ModelConfig)} - _ASIDE):
        said, is_ = getattr(definition.target, field), getattr(target.config, field)
        if said != is_:
            raise ValueError(
                f"{path}: drafter.target.{field}: {said!r}, but {target.name} has {is_!r}"
            )
    like = jax.eval_shape(lambda p: definition.init(jax.random.key(0), p), target.params)
    checkpoint = Checkpoint(folder)

    def read(keys, leaf):
        # Constants (a draft vocabulary's ids) keep their own integer type.
        integer = jnp.issubdtype(leaf.dtype, jnp.integer)
        dtypes = (leaf.dtype.name,) if integer else WEIGHT_DTYPES
        array = checkpoint.read(path_of(keys).replace("/", "."), leaf.shape, dtypes)
        return array.astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(read, like)
    ids_W = split_buffers(params)[1].get("vocab_ids")
    if ids_W is not None:
        source = f"{checkpoint.folder / SINGLE}: buffers.vocab_ids"
        _checked_ids(ids_W, target.config.vocab_size, source)
    return _beside(target, definition, params)


def _read_record(path: pathlib.Path, record: dict[str, Any]) -> tuple[Drafter, str]:
    """(definition, fingerprint of its target) from what `save` wrote in a config.json."""
    fields = section(record, path, "drafter")
    geometry = section(fields, path, "target")
    try:
        family, fingerprint = _family(record["algorithm"]), record["target_fingerprint"]
        fields = {k: v for k, v in fields.items() if k != "target"}
        return family.of(ModelConfig.of(geometry), fields), fingerprint
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}: missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a drafter's config: {error}") from error
