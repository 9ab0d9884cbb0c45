"""Tiny targets and the slow, obvious ways of using them; imported by tests in every folder."""

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decoding
from specjax.drafters import Context
from specjax.generation import request_keys
from specjax.models.config import ModelConfig
from specjax.models.target import Target
from specjax.models.transformer import init_params


def random_target(seed=0, scale=1.0, tokenizer=None, **changes) -> Target:
    """A tiny random Llama without a tokenizer; `scale` sharpens its distributions."""
    fields = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4,
        num_kv_heads=2, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    config = ModelConfig(**(fields | changes))
    params = init_params(jax.random.key(seed), config)
    # Embeddings of std 0.02 would make every distribution flat and every test toothless.
    params = params | {
        name: scale * 20 * params[name] for name in ("embed", "head") if name in params
    }
    return Target("random", config, params, tokenizer)


def toy_target(seed=264, tokenizer=None, **changes) -> Target:
    """Twelve tokens, so that even an untrained drafter is accepted now and then.

    The seed is one whose greedy continuations are varied and whose top two logits never come
    closer than 0.01 on the prompts below. Drawn by NumPy: nothing to compile.
    """
    fields = dict(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2,
        num_kv_heads=1, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    config = ModelConfig(**(fields | changes))
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if leaf.ndim == 1:  # norms
            return jnp.ones(leaf.shape)
        std = {"embed": 0.12, "head": 0.5}.get(path[0].key, leaf.shape[0] ** -0.5)
        return jnp.asarray(std * rng.normal(size=leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(fill, shapes)
    return Target("toy", config, params, tokenizer)


# Ragged, one of a single token.
PROMPTS = [[1], [2, 3, 4], [5, 1, 8, 2, 6], [6, 7, 1, 2, 9, 10, 11, 3, 3]]


def broken(params):
    """The same parameters, every weight NaN."""
    nan = lambda w: jnp.full_like(w, jnp.nan)  # noqa: E731
    weight = lambda w: jnp.issubdtype(w.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda w: nan(w) if weight(w) else w, params)


def greedy_continuations(target: Target, prompts, count: int, width: int = 64):
    """`count` greedy tokens after each prompt, one full causal forward a token, no cache."""
    tokens = np.zeros((len(prompts), width), np.int32)
    lengths = np.array([len(p) for p in prompts])
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows = np.arange(len(prompts))
    for _ in range(count):
        logits = np.asarray(target.logits(tokens))[rows, lengths - 1]
        tokens[rows, lengths] = logits.argmax(-1)
        lengths += 1
    return [tokens[i, len(p) : len(p) + count].tolist() for i, p in enumerate(prompts)]


def truncated(tokens, limit, stops):
    """What decoding must return of an endless continuation: plain Python, one token at a time."""
    kept = []
    for token in tokens:
        if len(kept) == limit:
            break
        kept.append(token)
        if token in stops:
            break
    return kept


def prefilled(engine, params, prompts, limits, width=32, slots=64, rounds=26, keys=None):
    """The state before the first round, at fixed shapes: one compilation for any prompts."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(p) for p in prompts], np.int32)
    limits = np.broadcast_to(np.asarray(limits, np.int32), lengths.shape)
    keys = request_keys(0, len(prompts)) if keys is None else keys
    return decoding.prefill(
        engine, params, jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(limits), keys,
        slots, rounds,
    )  # fmt: skip


def run_recording(engine, params, state):
    """(final state, a host copy of the state before every round and after the last).

    Rounds as `run_host` runs them, the surplus one at the end included.
    """
    record, done = [_host(state)], False
    while not done:
        done = record[-1].done_B.all()
        state = decoding.jit_round(engine, params, state)
        record.append(_host(state))
    return state, record


def _host(state):
    """A copy on the host (keys left out: they never change)."""
    return jax.tree.map(np.array, state.replace(keys_B=None))


def whole_prompt(committed) -> Context:
    """The context of a prefill whose rows are the whole prompt; no tokens are read from it."""
    return Context(committed.tokens_BxA, committed.counts_B + 1)
