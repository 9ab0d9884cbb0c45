"""The target's forward pass: a plain loop over an explicit stack of layers.

Parameters are one pytree:

    {"embed": VxD, "layers": [layer, ...] or one layer whose leaves carry a leading L axis,
     "final_norm": {"scale": D}, "head": VxD (absent when tied)}

A list is run unrolled (fastest on CPU), a stacked layer is scanned (short compile times on deep
models); both run the same `Block`.
"""

import contextlib
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from specjax.cache import KVCache
from specjax.models.config import ModelConfig
from specjax.models.layers import Block, RMSNorm
from specjax.models.linear import readout
from specjax.models.rope import rope_tables
from specjax.sharding import gathered, rows_over_mesh


@flax.struct.dataclass
class ForwardOut:
    """What one forward returns; `logits_of` turns hidden rows into logits where they are needed."""

    hidden_BxTxD: jax.Array  # after the final norm: the LM head's input
    taps_BxTxM: jax.Array | None  # residual stream entering each tapped layer, concatenated
    cache: KVCache | None  # rows written at slots lengths..lengths+T, lengths unchanged


def init_params(key, config: ModelConfig, dtype=jnp.float32):
    """Random parameters: normal(0.02) embeddings, LeCun-normal kernels, layers as a list."""
    embed_key, head_key, *layer_keys = jax.random.split(key, 2 + config.num_layers)
    D, V = config.hidden_size, config.vocab_size
    block = Block(config)
    x = jnp.zeros((1, 1, D))
    rope = rope_tables(config, jnp.zeros((1, 1), jnp.int32))
    mask = jnp.ones((1, 1, 1), bool)
    params = {
        "embed": 0.02 * jax.random.normal(embed_key, (V, D)),
        "layers": [block.init(k, x, rope, mask)["params"] for k in layer_keys],
        "final_norm": {"scale": jnp.ones(D)},
    }
    if not config.tie_word_embeddings:
        params["head"] = 0.02 * jax.random.normal(head_key, (V, D))
    return jax.tree.map(lambda w: w.astype(dtype), params)


def stack_layers(params):
    """List of layers -> one layer with a leading L axis (for scanning)."""
    return params | {"layers": jax.tree.map(lambda *w: jnp.stack(w), *params["layers"])}


def is_stacked(params) -> bool:
    """Whether the layers are one stacked layer, to be scanned."""
    return not isinstance(params["layers"], (list, tuple))


def unstack_layers(params):
    """The inverse of `stack_layers`."""
    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    return params | {"layers": [jax.tree.map(lambda w: w[i], layers) for i in range(count)]}  # noqa: B023


def precision_of(params):
    """float32 weights ask for float32 products; accelerators would otherwise round inputs."""
    if params["embed"].dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def embedded(params, tokens):
    """Embeddings ...xD of token ids."""
    return rows_over_mesh(gathered(params["embed"])[tokens])


def head_VxD(params):
    """The LM head's rows: its own matrix, or the embedding when tied."""
    return params["head"] if "head" in params else params["embed"]


def logits_of(params, hidden_BxTxD):
    """LM head over final-normed hidden states: BxTxV float32."""
    with jax.named_scope("lm_head"), precision_of(params):
        return readout(hidden_BxTxD, head_VxD(params))


def causal_mask(T: int):
    """Lower-triangular 1xTxT boolean mask."""
    return jnp.tril(jnp.ones((1, T, T), bool))


def text_layout(tokens_BxT, segments_BxT=None):
    """(positions BxT, mask) of whole texts read at once: RoPE positions, and which rows see which.

    A row is one text at positions 0..T-1 under a causal mask, 1xTxT; or several, `segments_BxT`
    numbering the text of each token (neighbours differ, padding has a number of its own). Then
    positions restart with every text and the mask, BxTxT, ends at its borders.
    """
    B, T = tokens_BxT.shape
    place_T = jnp.arange(T, dtype=jnp.int32)
    if segments_BxT is None:
        return jnp.broadcast_to(place_T, (B, T)), causal_mask(T)
    begins_BxT = jnp.diff(segments_BxT, axis=1, prepend=segments_BxT[:, :1] - 1) != 0
    first_BxT = jax.lax.cummax(jnp.where(begins_BxT, place_T, 0), axis=1)
    same_BxTxT = segments_BxT[:, :, None] == segments_BxT[:, None]
    return place_T - first_BxT, causal_mask(T) & same_BxTxT


def forward(
    params,
    config: ModelConfig,
    tokens_BxT,
    positions_BxT=None,
    mask=None,
    cache: KVCache | None = None,
    taps: Sequence[int] = (),
) -> ForwardOut:
    """Runs the decoder.

    Args:
      params: see the module docstring.
      config: geometry; static.
      tokens_BxT: int32 ids.
      positions_BxT: RoPE positions; 0..T-1 when absent.
      mask: BxTxT (no cache) or BxTxS (cache) booleans, True = visible; causal when absent and
        no cache is given.
      cache: rows are written at slots lengths..lengths+T and the mask addresses slots.
      taps: ids of layers whose input is returned, in order, concatenated on the last axis;
        `num_layers` is the LM head, whose input is the final-normed hidden state.

    Raises:
      ValueError: a cache without a mask, or a tap that is no layer's id.
    """
    B, T = tokens_BxT.shape
    if any(not 0 <= tap <= config.num_layers for tap in taps):
        raise ValueError(f"taps: {tuple(taps)} must lie in [0, {config.num_layers}]")
    inner = tuple(tap for tap in taps if tap < config.num_layers)
    if positions_BxT is None:
        positions_BxT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if mask is None:
        if cache is not None:
            raise ValueError("mask: required with a cache (see cache.py for the masks)")
        mask = causal_mask(T)
    block = Block(config)
    start_B = None if cache is None else cache.lengths_B

    def run(layer, x, kv):
        x, kv = block.apply({"params": layer}, x, rope, mask, kv, start_B)
        return x, None if cache is None else kv

    with precision_of(params):
        x = embedded(params, tokens_BxT)
        rope = rope_tables(config, positions_BxT)
        through = _scanned if is_stacked(params) else _unrolled
        x, cache, tapped = through(run, params["layers"], x, cache, inner)
        hidden = RMSNorm(config.rms_norm_eps).apply({"params": params["final_norm"]}, x)
    entering = dict(zip(inner, tapped, strict=True)) | {config.num_layers: hidden}
    taps_BxTxM = jnp.concatenate([entering[tap] for tap in taps], axis=-1) if taps else None
    return ForwardOut(hidden, taps_BxTxM, cache)


def text_features(params, config: ModelConfig, taps, tokens_BxT, segments_BxT=None) -> dict:
    """What training reads of a target: {"hidden": BxTxD, the LM head's input, "taps": BxTxM}.

    Without taps there is no entry of that name. `segments_BxT` as in `text_layout`.
    """
    layout = text_layout(tokens_BxT, segments_BxT)
    out = forward(params, config, tokens_BxT, *layout, taps=taps)
    return {"hidden": out.hidden_BxTxD} | ({"taps": out.taps_BxTxM} if taps else {})


def _unrolled(run, layers, x, cache, taps):
    entering, ks, vs = {}, [], []
    for i, layer in enumerate(layers):
        entering[i] = x
        kv = None if cache is None else (cache.k[i], cache.v[i])
        with jax.named_scope(f"layer_{i}"):
            x, kv = run(layer, x, kv)
        if kv is not None:
            ks.append(kv[0])
            vs.append(kv[1])
    if cache is not None:
        cache = cache.replace(k=tuple(ks), v=tuple(vs))
    return x, cache, [entering[i] for i in taps]


def _scanned(run, layers, x, cache, taps):
    ids = jnp.arange(jax.tree.leaves(layers)[0].shape[0])
    tapped = [jnp.zeros_like(x) for _ in taps]

    def step(carry, item):
        x, tapped = carry
        i, layer, kv = item
        tapped = [jnp.where(i == t, x, old) for t, old in zip(taps, tapped, strict=True)]
        x, kv = run(layer, x, kv)
        return (x, tapped), kv

    kvs = None if cache is None else (cache.k, cache.v)
    (x, tapped), kvs = jax.lax.scan(step, (x, tapped), (ids, layers, kvs))
    if cache is not None:
        cache = cache.replace(k=kvs[0], v=kvs[1])
    return x, cache, tapped
