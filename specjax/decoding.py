"""One round of speculative decoding as a pure function, and the two drivers that run it.

    draft -> one target forward over the tree -> verify -> truncate -> commit

Plain decoding is the same round with a tree of one row, so every method is timed and tested on the
same code. Between rounds each row keeps this invariant: the target's cache holds all committed
tokens but the newest one, the root, which the next round verifies as row 0 of its tree.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from specjax.cache import KVCache, causal_cache_mask, compact, empty_cache, tree_cache_mask
from specjax.drafters.base import Committed, Context, Drafter, Scored
from specjax.models.config import ModelConfig
from specjax.models.transformer import forward, is_stacked, logits_of
from specjax.sampling import Sampling, draw
from specjax.sharding import DecodeLayout
from specjax.trees import DraftTree, visible_from_parents
from specjax.verification.base import LogitRows, Rule, make_noise


@flax.struct.dataclass
class DecodeState:
    """Everything a round reads and writes; donated from round to round."""

    cache: KVCache  # target keys and values; lengths = committed tokens - 1
    drafter: Any  # the drafter's own state
    tokens_BxS: jax.Array  # int32 committed tokens, prompt first; junk past lengths
    lengths_B: jax.Array  # int32 committed tokens, root included
    prompts_B: jax.Array  # int32 prompt lengths
    limits_B: jax.Array  # int32 most new tokens a row may have
    done_B: jax.Array  # bool; a done row emits nothing more
    emitted_BxR: jax.Array  # int32 tokens emitted by each round
    rounds_B: jax.Array  # int32 rounds in which the row was live
    keys_B: jax.Array  # one random key per request


@dataclasses.dataclass(frozen=True)
class Engine:
    """The static half of decoding: one compilation per value of it and per array shape."""

    config: ModelConfig
    drafter: Drafter
    rule: Rule
    sampling: Sampling = Sampling()
    stop_tokens: tuple[int, ...] = ()
    layout: DecodeLayout | None = None  # on a mesh: how the state lies on it

    def __post_init__(self):
        self.rule.check(self.sampling, self.drafter)

    @property
    def scratch(self) -> int:
        """Slots past the last committed token that a round may write."""
        return max(self.drafter.nodes, self.drafter.depth + 1, self.drafter.scratch)


# ---- the parts of a round ------------------------------------------------------------------------


def draft(engine: Engine, params, state: DecodeState) -> tuple[DraftTree, Any]:
    """The drafter's tree and its state after drafting."""
    context = Context(state.tokens_BxS, state.lengths_B)
    keys_B = jax.vmap(lambda k, r: jax.random.fold_in(jax.random.fold_in(k, r), 1))(
        state.keys_B, state.rounds_B
    )
    with jax.named_scope("draft"):
        return engine.drafter.draft(
            params["drafter"], params["target"], state.drafter, context, keys_B
        )


def score(engine: Engine, params, cache: KVCache, tree: DraftTree) -> tuple[Scored, KVCache]:
    """The target's forward over the tree's rows, which it leaves in the cache's scratch slots."""
    topology = engine.drafter.topology
    if topology is not None:
        visible = topology.visible_TxT
    else:
        visible = jax.vmap(lambda p: visible_from_parents(p, engine.drafter.depth))(tree.parent_T)
    with jax.named_scope("verify"):
        out = forward(
            params["target"],
            engine.config,
            tree.tokens_T,
            cache.lengths_B[:, None] + tree.depth_T,
            tree_cache_mask(cache.lengths_B, visible, cache.slots),
            cache,
            engine.drafter.taps,
        )
        logits_BxTxV = logits_of(params["target"], out.hidden_BxTxD)
        return Scored(logits_BxTxV, out.hidden_BxTxD, out.taps_BxTxM), out.cache


def truncate(engine: Engine, tokens_BxA, count_B, remaining_B):
    """Cuts at the first stop token (kept) and at the length limit; returns (count_B, done_B)."""
    A = tokens_BxA.shape[1]
    place = jnp.arange(A)
    emitted = place < count_B[:, None]
    stops = jnp.zeros_like(emitted)
    for token in engine.stop_tokens:
        stops |= tokens_BxA == token
    first_stop_B = jnp.min(jnp.where(stops & emitted, place, A), axis=1)
    count_B = jnp.minimum(jnp.minimum(count_B, first_stop_B + 1), remaining_B)
    return count_B, (first_stop_B < count_B) | (count_B >= remaining_B)


def commit(
    engine: Engine, state: DecodeState, cache, drafter_state, params, tree, scored: Scored, out
):
    """Writes the accepted rows into cache, token buffer and drafter state."""
    A, taps = engine.drafter.depth + 1, scored.taps_BxTxM
    count_B, done_B = truncate(
        engine, out.tokens_A, out.count, state.limits_B - (state.lengths_B - state.prompts_B)
    )
    count_B = jnp.where(state.done_B, 0, count_B)
    B = count_B.shape[0]
    # Committed rows by place: the root, then the accepted nodes. -1 (nothing) stays where it is.
    places = jnp.arange(1, A, dtype=jnp.int32)
    path_BxD = jnp.where(out.path_D >= 0, out.path_D, places)
    rows_BxA = jnp.concatenate([jnp.zeros((B, 1), jnp.int32), path_BxD], axis=1)
    with jax.named_scope("commit"):
        topology = engine.drafter.topology
        if topology is None or not topology.only_last_moves:
            cache = compact(cache, rows_BxA[:, 1:], 1, count_B)
        elif topology.nodes == topology.max_depth + 1:  # a chain: everything is in place
            cache = cache.replace(lengths_B=cache.lengths_B + count_B)
        else:
            last_B = jnp.maximum(count_B - 1, 0)
            node_B = jnp.take_along_axis(rows_BxA, last_B[:, None], axis=1)
            cache = compact(cache, node_B, last_B, count_B)
        taps_BxAxM = None
        if taps is not None:
            taps_BxAxM = jnp.take_along_axis(taps, rows_BxA[..., None], axis=1)
        committed = Committed(out.tokens_A, taps_BxAxM, count_B)
        drafter_state = engine.drafter.absorb(
            params["drafter"], drafter_state, committed, tree, scored
        )
        write = jax.vmap(lambda row, new, n: jax.lax.dynamic_update_slice(row, new, (n,)))
        live_B = ~state.done_B
        return state.replace(
            cache=cache,
            drafter=drafter_state,
            tokens_BxS=write(state.tokens_BxS, out.tokens_A, state.lengths_B),
            lengths_B=state.lengths_B + count_B,
            done_B=state.done_B | done_B,
            emitted_BxR=write(state.emitted_BxR, count_B[:, None], state.rounds_B),
            rounds_B=state.rounds_B + live_B,
        )


def verify(engine: Engine, state: DecodeState, tree: DraftTree, scored: Scored):
    """The rule, written for one sequence, mapped over the batch."""
    rule, drafter = engine.rule, engine.drafter

    def one(key, rounds, tree, logits_TxV, hidden_TxD):
        key = jax.random.fold_in(jax.random.fold_in(key, rounds), 0)
        noise = make_noise(key, drafter.nodes, drafter.depth)
        force_T = rule.force(hidden_TxD) if rule.reads_hidden else None
        return rule.verify(noise, tree, LogitRows(logits_TxV, engine.sampling), force_T)

    with jax.named_scope("accept"):
        return jax.vmap(one)(
            state.keys_B, state.rounds_B, tree, scored.logits_BxTxV, scored.hidden_BxTxD
        )


def round(engine: Engine, params, state: DecodeState) -> DecodeState:
    """One round. `params` is {"target": ..., "drafter": ...}; rows that are done do not change."""
    tree, drafter_state = draft(engine, params, state)
    scored, cache = score(engine, params, state.cache, tree)
    out = verify(engine, state, tree, scored)
    return laid_out(engine, commit(engine, state, cache, drafter_state, params, tree, scored, out))


def laid_out(engine: Engine, state: DecodeState) -> DecodeState:
    """On a mesh, the state where the next round expects it: the same before and after a round."""
    return state if engine.layout is None else engine.layout.constrain(state)


def _run_prompt(config: ModelConfig, taps, target, cache: KVCache, tokens_BxP, counts_B):
    """The target over padded rows behind the cache's: (cache, logits_BxV after the last, taps)."""
    B, P = tokens_BxP.shape
    mask = causal_cache_mask(cache.lengths_B, P, cache.slots)
    positions = cache.lengths_B[:, None] + jnp.arange(P, dtype=jnp.int32)
    with jax.named_scope("prefill"):
        out = forward(target, config, tokens_BxP, positions, mask, cache, taps)
    last = jnp.take_along_axis(out.hidden_BxTxD, (counts_B - 1)[:, None, None], axis=1)
    return out.cache, logits_of(target, last)[:, 0], out.taps_BxTxM


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _prefill_target(config: ModelConfig, taps, target, tokens_BxP, prompts_B, slots: int):
    """The target over padded prompts: (cache, logits_BxV after each prompt, taps or None)."""
    dtype, B = target["embed"].dtype, tokens_BxP.shape[0]
    cache = empty_cache(config, B, slots, dtype, stacked=is_stacked(target))
    return _run_prompt(config, taps, target, cache, tokens_BxP, prompts_B)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _extend_target(config: ModelConfig, taps, target, cache: KVCache, tokens_BxP, counts_B):
    """The same on top of a cache that holds what comes before."""
    return _run_prompt(config, taps, target, cache, tokens_BxP, counts_B)


@functools.partial(jax.jit, static_argnums=(0, 9), donate_argnums=(2, 10))
def _first_state(
    engine: Engine, params, cache, logits_BxV, taps, tokens_BxP, counts_B, limits_B, keys_B, rounds,
    before=None,
) -> DecodeState:  # fmt: skip
    """Draws the first new token and fills the drafter's state from the prompt.

    The cache's lengths say where in the text the rows of `tokens_BxP` begin. `before` is (drafter
    state, tokens_BxS) where that is not the beginning.
    """
    B, P = tokens_BxP.shape
    target, slots, begin_B = params["target"], cache.slots, cache.lengths_B
    if before is None:
        drafter_state = engine.drafter.init_state(B, slots, target["embed"].dtype)
        tokens_BxS = jnp.zeros((B, slots), jnp.int32)
    else:
        drafter_state, tokens_BxS = before
    # Rounds count from 1 here, so prefill's draw owns index 0 of the request's noise.
    first_keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, 0), 0))(keys_B)
    first_B = jax.vmap(lambda k, row: draw(k, row, engine.sampling))(first_keys, logits_BxV)
    prompts_B = begin_B + counts_B
    write = jax.vmap(lambda row, new, n: jax.lax.dynamic_update_slice(row, new, (n,)))
    tokens_BxS = write(tokens_BxS, tokens_BxP, begin_B)
    tokens_BxS = jax.vmap(lambda row, n, t: row.at[n].set(t))(tokens_BxS, prompts_B, first_B)
    following = jnp.pad(tokens_BxP[:, 1:], ((0, 0), (0, 1)))  # row p's next token
    following = jax.vmap(lambda row, n, t: row.at[n - 1].set(t))(following, counts_B, first_B)
    drafter_state = engine.drafter.prefill(
        params["drafter"],
        target,
        drafter_state,
        Committed(following, taps, counts_B),
        Context(tokens_BxS, prompts_B + 1),
    )
    ones = jnp.ones(B, jnp.int32)
    _, done_B = truncate(engine, first_B[:, None], ones, limits_B)
    state = DecodeState(
        cache=cache.replace(lengths_B=prompts_B),
        drafter=drafter_state,
        tokens_BxS=tokens_BxS,
        lengths_B=prompts_B + 1,
        prompts_B=prompts_B,
        limits_B=limits_B,
        done_B=done_B,
        emitted_BxR=jnp.zeros((B, rounds + 1), jnp.int32),
        rounds_B=ones * 0 + 1,
        keys_B=keys_B,
    )
    return laid_out(engine, state)


def prefill(engine: Engine, params, tokens_BxP, prompts_B, limits_B, keys_B, slots, rounds):
    """Runs the padded prompts, draws the first new token and fills the drafter's state.

    Two programs: the target's forward, by far the longer to compile, is one for all drafters that
    want the same taps, at any temperature.

    Args:
      tokens_BxP: prompts, padded on the right to a bucket.
      prompts_B: their lengths.
      limits_B: most new tokens per row (>= 1).
      slots: S of every cache, static.
      rounds: R, the most rounds that will be run, static.
    """
    cache, logits_BxV, taps = _prefill_target(
        engine.config, engine.drafter.taps, params["target"], tokens_BxP, prompts_B, slots
    )
    return _first_state(
        engine, params, cache, logits_BxV, taps, tokens_BxP, prompts_B, limits_B, keys_B, rounds
    )


def extend(
    engine: Engine, params, state: DecodeState, tokens_BxP, begin_B, counts_B, limits_B, keys_B
) -> DecodeState:
    """Goes on with more text after a decoded state, which it consumes: the next turn's prompt.

    The text is the state's own up to `begin_B`, then these rows. The caches keep what comes before;
    nothing after it is read, so the text may also part from what was decoded.

    Args:
      tokens_BxP: the rows, padded on the right to a bucket.
      begin_B: where in the text they begin, at most the committed tokens - depth - 2: a drafter's
        state may not hold the last round's tokens yet. begin + P must not exceed the slots.
      counts_B: how many rows count (>= 1).
      limits_B, keys_B: as in `prefill`.
    """
    cache, logits_BxV, taps = _extend_target(
        engine.config, engine.drafter.taps, params["target"],
        state.cache.replace(lengths_B=begin_B), tokens_BxP, counts_B,
    )  # fmt: skip
    return _first_state(
        engine, params, cache, logits_BxV, taps, tokens_BxP, counts_B, limits_B, keys_B,
        state.emitted_BxR.shape[1] - 1, (state.drafter, state.tokens_BxS),
    )  # fmt: skip


# ---- the two drivers -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def jit_round(engine: Engine, params, state: DecodeState) -> DecodeState:
    """`round`, compiled, the state donated."""
    return round(engine, params, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_device(engine: Engine, params, state: DecodeState) -> DecodeState:
    """Runs to the end in one `while_loop` on the device."""
    return jax.lax.while_loop(
        lambda s: ~jnp.all(s.done_B), lambda s: round(engine, params, s), state
    )


def run_host(engine: Engine, params, state: DecodeState) -> DecodeState:
    """Runs to the end from a host loop.

    `done` is read one round late, so the device always has a round queued; the surplus round at
    the end changes nothing.
    """
    done = jnp.all(state.done_B)
    while True:
        state = jit_round(engine, params, state)
        if bool(np.asarray(done)):
            return state
        done = jnp.all(state.done_B)
