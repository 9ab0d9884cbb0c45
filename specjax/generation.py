"""`generate`: convenience over the pure functions below it."""

import dataclasses
import operator
import reprlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decoding
from specjax.drafters import Drafter, Vanilla
from specjax.models.target import Target
from specjax.sampling import GREEDY, Sampling, seed_key
from specjax.sharding import DecodeLayout, fetch
from specjax.trained import TrainedDrafter
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
      ValueError: an empty prompt, one that is neither text nor token ids, or ids outside the
        vocabulary.
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
            expected = "a string or a list of token ids (one prompt of ids is [[1, 2]])"
            ids = _list(prompt, f"prompts[{i}]", expected)
        if not ids:
            raise ValueError(f"prompts[{i}]: empty")
        encoded.append([_token(t, target, f"prompts[{i}]") for t in ids])
    return encoded


def _list(values, field: str, expected: str) -> list:
    try:
        return list(values)
    except TypeError:
        raise ValueError(f"{field}: {reprlib.repr(values)} is not {expected}") from None


def _token(value, target: Target, field: str) -> int:
    try:
        token = operator.index(value)
    except TypeError:
        raise ValueError(f"{field}: {reprlib.repr(value)} is not a token id") from None
    if not 0 <= token < target.config.vocab_size:
        raise ValueError(
            f"{field}: token {token} is outside the vocabulary of {target.config.vocab_size}"
        )
    return token


def settled(definition: Drafter, sampling: Sampling, rule: str | Rule | None = None):
    """(the drafter drawing its tokens as the rule needs them, the rule).

    Args:
      rule: None (the drafter's default), a name or a rule; exact ones are greedy at temperature 0.

    Raises:
      ValueError: an unknown rule.
    """
    if rule is None:
        rule = definition.default_rule
    if isinstance(rule, str):
        rule = get_rule(rule)
    if sampling.greedy and rule.exact:
        rule = get_rule("greedy")
    return definition.drawn(rule.draws, sampling), rule


def make_engine(
    target: Target,
    drafter: TrainedDrafter | None,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    rule: str | Rule | None = None,
):
    """(engine, parameters) for a target with a drafter (None: plain decoding).

    Raises:
      ValueError: a drafter that is none or is another target's, a stop token outside the
        vocabulary, an unknown rule, a rule that refuses the settings.
    """
    if not isinstance(drafter, TrainedDrafter | None):
        raise ValueError(
            f"drafter: {reprlib.repr(drafter)} is not one; init_drafter or load_drafter makes one"
        )
    definition = Vanilla(target.config) if drafter is None else drafter.definition
    if drafter is not None and drafter.fingerprint != target.fingerprint:
        raise ValueError(
            f"drafter {drafter.name!r} was made for another target (fingerprint "
            f"{drafter.fingerprint}, {target.name} has {target.fingerprint})"
        )
    definition, rule = settled(definition, sampling, rule)
    stops = target.config.eos_token_ids
    if stop_tokens is not None:
        given = enumerate(_list(stop_tokens, "stop_tokens", "a list of token ids"))
        stops = tuple(_token(t, target, f"stop_tokens[{i}]") for i, t in given)
    layout = None if target.mesh is None else layout_of(target.mesh, drafter)
    engine = decoding.Engine(target.config, definition, rule, sampling, stops, layout)
    return engine, {"target": target.params, "drafter": {} if drafter is None else drafter.params}


def layout_of(mesh, drafter: TrainedDrafter | None) -> DecodeLayout:
    """How decoding lies on the target's mesh, by where the drafter's parameters are."""
    leaves = [] if drafter is None else jax.tree.leaves(drafter.params)
    return DecodeLayout(mesh, any(not leaf.sharding.is_fully_replicated for leaf in leaves))


def request_keys(seed: int, count: int, first: int = 0):
    """One random key per request: the same request draws the same noise in any batch."""
    base = seed_key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(base, i))(first + jnp.arange(count))


def cache_slots(engine, longest_prompt: int, max_new_tokens: int) -> int:
    """S for a request: what it can fill, in steps of 64 (every round reads all of them)."""
    longest_text = min(longest_prompt + max_new_tokens, engine.config.max_position_embeddings)
    needed = longest_text + engine.scratch
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
    limits = np.minimum(min(max_new_tokens, limit), limit - lengths).astype(np.int32)
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
      seed: of the sampling noise, 0 to 2**32 - 1.
      stop_tokens: None = the config's end-of-sequence ids, () = none.
      rule: None (the drafter's default), a name or a rule; exact rules are greedy at temperature 0.

    Raises:
      ValueError: a prompt that is empty or leaves no room in the context, or a setting out of
        range (names the argument).
    """
    if int(max_new_tokens) != max_new_tokens or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} must be an integer >= 1")
    encoded = encode_prompts(target, prompts)
    sampling = Sampling(float(temperature), top_k, float(top_p))
    engine, params = make_engine(target, drafter, sampling, stop_tokens, rule)
    state = start(engine, params, encoded, int(max_new_tokens), seed)
    state = decoding.run_host(engine, params, state)
    tokens, accepts = collect(state)
    if drafter is not None:
        drafter = drafter.after(state)
    decode = target.tokenizer.decode if target.tokenizer is not None else lambda ids: ""
    return Generation(tokens, [decode(ids) for ids in tokens], accepts, drafter)
