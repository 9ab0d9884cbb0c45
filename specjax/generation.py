"""`generate` and the drafter constructors: convenience over the pure functions below them."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decoding
from specjax.drafters import DRAFTERS, Drafter, Vanilla
from specjax.files import write_safetensors, write_text
from specjax.interchange import import_drafter, is_foreign
from specjax.models.config import ModelConfig, read_json
from specjax.models.hf import WEIGHT_DTYPES, Checkpoint
from specjax.models.target import Target
from specjax.sampling import GREEDY, Sampling
from specjax.sharding import MODEL_RULES, DecodeLayout, Rules, fetch, path_of, place, shardings
from specjax.verification import Rule, get_rule

_BUCKETS = (16, 32, 64, 128, 256, 512, 1024)
_PER_BUCKET = 1024  # longer prompts and caches are padded to multiples of this


def bucket(size: int) -> int:
    """The padded length for `size` rows: a power of two up to 1024, then multiples of 1024."""
    for length in _BUCKETS:
        if size <= length:
            return length
    return -(-size // _PER_BUCKET) * _PER_BUCKET


def pad_to_bucket(rows: Sequence[Sequence[int]], length: int = 0) -> np.ndarray:
    """int32 BxP: rows padded on the right to the longest one's bucket, and to `length` at least."""
    padded = np.zeros((len(rows), max(bucket(max(map(len, rows))), length)), np.int32)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    return padded


# ---- drafters --------------------------------------------------------------------------------


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
        weights = {k: v for k, v in self.params.items() if k != "buffers"}
        return sum(w.size for w in jax.tree.leaves(weights))

    def on(self, mesh, rules: Rules | None = None) -> "TrainedDrafter":
        """The same parameters laid out on a mesh, by its own rules where none are given."""
        rules = (*self.definition.partition, *MODEL_RULES) if rules is None else rules
        params = place(self.params, shardings(mesh, self.params, rules))
        return dataclasses.replace(self, params=params)

    def with_budget(self, **changes) -> "TrainedDrafter":
        """The same parameters drafting another tree (depth, candidates, nodes)."""
        definition = self.definition.with_budget(**changes)
        return dataclasses.replace(self, definition=definition)

    def after(self, state: decoding.DecodeState) -> "TrainedDrafter":
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


# ---- generate --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns, one entry per prompt."""

    tokens: list[list[int]]  # new tokens only, cut after the first stop token
    texts: list[str]
    accept_lengths: list[list[int]]  # prefill's 1, then tokens emitted by each round
    drafter: TrainedDrafter | None = None  # as it is afterwards: some learn from use


def encode_prompts(target: Target, prompts: Sequence) -> list[list[int]]:
    """Token ids of each prompt: strings get the tokenizer's special tokens, ids pass through.

    Raises:
      ValueError: an empty prompt, or ids outside the vocabulary.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError("prompts: a list of strings or of token-id lists is expected")
    if not prompts:
        raise ValueError("prompts: the list is empty")
    encoded = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if target.tokenizer is None:
                raise ValueError(f"prompts[{i}]: {target.name} has no tokenizer; give token ids")
            if not prompt:
                raise ValueError(f"prompts[{i}]: empty")
            ids = list(target.tokenizer(prompt)["input_ids"])
        else:
            ids = [int(t) for t in prompt]
        if not ids:
            raise ValueError(f"prompts[{i}]: empty")
        bad = [t for t in ids if not 0 <= t < target.config.vocab_size]
        if bad:
            raise ValueError(
                f"prompts[{i}]: token {bad[0]} is outside the vocabulary of "
                f"{target.config.vocab_size}"
            )
        encoded.append(ids)
    return encoded


def make_engine(
    target: Target,
    drafter: TrainedDrafter | None,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    rule: str | Rule | None = None,
):
    """(engine, parameters) for a target with a drafter (None: plain decoding).

    Raises:
      ValueError: a drafter of another target, an unknown rule, a rule that refuses the settings.
    """
    definition = Vanilla(target.config) if drafter is None else drafter.definition
    if drafter is not None and drafter.fingerprint != target.fingerprint:
        raise ValueError(
            f"drafter {drafter.name!r} was made for another target (fingerprint "
            f"{drafter.fingerprint}, {target.name} has {target.fingerprint})"
        )
    if rule is None:
        rule = definition.default_rule
    if isinstance(rule, str):
        rule = get_rule(rule)
    if sampling.greedy and rule.exact:
        rule = get_rule("greedy")  # every exact rule is greedy at temperature 0
    definition = definition.drawn(rule.draws, sampling)
    stops = target.config.eos_token_ids if stop_tokens is None else tuple(stop_tokens)
    layout = None if target.mesh is None else layout_of(target.mesh, drafter)
    engine = decoding.Engine(target.config, definition, rule, sampling, stops, layout)
    return engine, {"target": target.params, "drafter": {} if drafter is None else drafter.params}


def layout_of(mesh, drafter: TrainedDrafter | None) -> DecodeLayout:
    """How decoding lies on the target's mesh, by where the drafter's parameters are."""
    leaves = [] if drafter is None else jax.tree.leaves(drafter.params)
    return DecodeLayout(mesh, any(not leaf.sharding.is_fully_replicated for leaf in leaves))


def request_keys(seed: int, count: int, first: int = 0):
    """One random key per request: the same request draws the same noise in any batch."""
    base = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(base, i))(first + jnp.arange(count))


def cache_slots(engine, longest_prompt: int, max_new_tokens: int) -> int:
    """S for a request: what it can fill, in steps of 64 (every round reads all of them)."""
    needed = longest_prompt + max_new_tokens + engine.scratch
    return max(-(-needed // 64) * 64, bucket(longest_prompt))


def start(
    engine,
    params,
    prompts: list[list[int]],
    max_new_tokens: int,
    seed: int = 0,
    slots: int = 0,
    length: int = 0,
    first_request: int = 0,
):
    """Pads prompts to a bucket and prefills them: the state before the first round.

    `slots` and `length` ask for more cache slots and a longer padded prompt than these prompts
    need, so that many requests share one compilation. `first_request` numbers the requests: two
    batches of one run must not share noise.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    limit = engine.config.max_position_embeddings
    longest = int(lengths.max())
    if longest >= limit:
        i = int(lengths.argmax())
        raise ValueError(f"prompts[{i}]: {longest} tokens do not fit a context of {limit}")
    limits = np.minimum(max_new_tokens, limit - lengths).astype(np.int32)
    padded = pad_to_bucket(prompts, length)
    slots = max(slots, cache_slots(engine, longest, max_new_tokens), padded.shape[1])
    # Every round emits a token, so there are never more rounds than slots; counting them by
    # max_new_tokens would compile anew for each value of it.
    return decoding.prefill(
        engine, params, jnp.asarray(padded), jnp.asarray(lengths), jnp.asarray(limits),
        request_keys(seed, len(prompts), first_request), slots, slots,
    )  # fmt: skip


def overlap(engine, state, prompts: list[list[int]]) -> tuple[np.ndarray, int]:
    """(begin_B, P): where `resume` starts to run each text anew, and how many rows it pads to."""
    texts, lengths = (np.array(x) for x in (state.tokens_BxS, state.lengths_B))
    slots, begin = state.cache.slots, []
    for prompt, text, length in zip(prompts, texts, lengths, strict=True):
        same = min(len(prompt), length)
        same = int(np.argmin(np.append(text[:same] == prompt[:same], False)))
        # The root and the last round's tokens may not be in all caches yet.
        begin.append(max(0, min(same - 1, length - 2 - engine.drafter.depth)))
    longest = max(len(p) - n for p, n in zip(prompts, begin, strict=True))
    width = min(bucket(longest), slots)
    return np.minimum(begin, slots - width).astype(np.int32), width


def room(engine, slots: int) -> int:
    """Tokens, prompt and answers, that fit a cache of `slots` and the target's context."""
    return min(slots - engine.scratch, engine.config.max_position_embeddings)


def resume(
    engine,
    params,
    state: decoding.DecodeState,
    prompts: list[list[int]],
    max_new_tokens: int,
    seed: int = 0,
    first_request: int = 0,
) -> decoding.DecodeState:
    """Prefills longer texts on top of a decoded state, which it consumes.

    What a text has in common with its row's tokens stays in the caches and is not run again, but
    for the last round's tokens: a conversation costs its new text only.

    Raises:
      ValueError: a text that leaves no room for an answer; the state is then untouched.
    """
    lengths, most = np.array([len(p) for p in prompts]), room(engine, state.cache.slots)
    if lengths.max() >= most:
        i = int(lengths.argmax())
        raise ValueError(f"prompts[{i}]: {lengths[i]} tokens do not fit a cache of {most}")
    begin_B, width = overlap(engine, state, prompts)
    rows = pad_to_bucket([p[n:] for p, n in zip(prompts, begin_B, strict=True)])[:, :width]
    limits = np.minimum(max_new_tokens, most - lengths)
    return decoding.extend(
        engine, params, state, *map(jnp.asarray, (rows, begin_B)),
        *(jnp.asarray(x, jnp.int32) for x in (lengths - begin_B, limits)),
        request_keys(seed, len(prompts), first_request),
    )  # fmt: skip


def collect(state) -> tuple[list[list[int]], list[list[int]]]:
    """(new tokens, accept lengths) of a finished state."""
    tokens, lengths, prompts, emitted = fetch(
        (state.tokens_BxS, state.lengths_B, state.prompts_B, state.emitted_BxR)
    )
    new = [row[p:n].tolist() for row, p, n in zip(tokens, prompts, lengths, strict=True)]
    accepts = [[1] + [int(c) for c in row[1:] if c > 0] for row in emitted]
    return new, accepts


def generate(
    target: Target,
    prompts: Sequence,
    drafter: TrainedDrafter | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    rule: str | Rule | None = None,
) -> Generation:
    """Decodes a batch of prompts, with a drafter or (None) plainly.

    Args:
      target: from `load_target`.
      prompts: strings (encoded with the tokenizer's special tokens, no chat template) or lists of
        token ids; any lengths, one batch.
      drafter: from `init_drafter` or `load_drafter`. It is not changed: what it learns from use
        (`token_recycling`'s matrix) is in the result's `drafter`, to be passed to the next call.
      max_new_tokens: at least 1; a row also stops when the context is full.
      temperature, top_k, top_p: see `sampling.Sampling`; 0, 0, 1 is greedy.
      seed: of the sampling noise.
      stop_tokens: None = the config's end-of-sequence ids, () = none.
      rule: None (the drafter's default), a name or a rule; exact rules are greedy at temperature 0.

    Raises:
      ValueError: a prompt that is empty or longer than the context, or a setting out of range.
    """
    if int(max_new_tokens) != max_new_tokens or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} must be an integer >= 1")
    encoded = encode_prompts(target, prompts)
    sampling = Sampling(float(temperature), int(top_k), float(top_p))
    engine, params = make_engine(target, drafter, sampling, stop_tokens, rule)
    state = start(engine, params, encoded, int(max_new_tokens), seed)
    state = decoding.run_host(engine, params, state)
    tokens, accepts = collect(state)
    if drafter is not None:
        drafter = drafter.after(state)
    decode = target.tokenizer.decode if target.tokenizer is not None else lambda ids: ""
    return Generation(tokens, [decode(ids) for ids in tokens], accepts, drafter)
