"""The decoder layer: RMSNorm, grouped-query attention over an explicit cache, SwiGLU."""

import contextlib
import contextvars

import flax.linen as nn
import jax
import jax.numpy as jnp

from specjax.models.config import ModelConfig
from specjax.models.linear import linear
from specjax.models.rope import rotate
from specjax.sharding import rows_over_mesh


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def attend(q_BxTxGxRxK, k_BxGxSxK, v_BxGxSxK, mask_BxTxS, chain=()):
    """Softmax attention; R query heads share each of G key/value heads. Returns BxTx(G*R*K).

    `chain` holds further (k, v) pairs of shape BxGxTxK that only the same row t sees: one more
    column each instead of a T x T block (EAGLE-3's training-time test).
    """
    B, T, G, R, K = q_BxTxGxRxK.shape
    q_BxGxRxTxK = q_BxTxGxRxK.transpose(0, 2, 3, 1, 4)
    scores_BxGxQxS = jnp.einsum(
        "bgqk,bgsk->bgqs",
        q_BxGxRxTxK.reshape(B, G, R * T, K),
        k_BxGxSxK,
        preferred_element_type=jnp.float32,
    )
    scores = scores_BxGxQxS.reshape(B, G, R, T, -1)
    scores = jnp.where(mask_BxTxS[:, None, None], scores * K**-0.5, jnp.finfo(jnp.float32).min)
    for k_BxGxTxK, _ in chain:
        own = jnp.sum(q_BxGxRxTxK * k_BxGxTxK[:, :, None], axis=-1, dtype=jnp.float32)
        scores = jnp.concatenate([scores, own[..., None] * K**-0.5], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxGxSxK.dtype)
    S = k_BxGxSxK.shape[2]
    out_BxGxQxK = jnp.einsum("bgqs,bgsk->bgqk", weights[..., :S].reshape(B, G, R * T, S), v_BxGxSxK)
    out = out_BxGxQxK.reshape(B, G, R, T, K)
    for j, (_, v_BxGxTxK) in enumerate(chain):
        out = out + weights[..., S + j, None] * v_BxGxTxK[:, :, None]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, -1)


def write_rows(cache_BxGxSxK, rows_BxGxTxK, start_B):
    """Overwrites slots start..start+T of each row's cache."""
    rows = rows_BxGxTxK.astype(cache_BxGxSxK.dtype)
    if rows.shape[0] == 1:  # a plain slice update: XLA does it in place, a scatter it loops over
        return jax.lax.dynamic_update_slice(cache_BxGxSxK, rows, (0, 0, start_B[0], 0))
    update = jax.vmap(lambda c, r, s: jax.lax.dynamic_update_slice(c, r, (0, s, 0)))
    return update(cache_BxGxSxK, rows, start_B)


class Attention(nn.Module):
    """Grouped-query attention with RoPE; q, k and v come from one matrix, grouped by k/v head.

    The kernel is DxGx(R+2)xK: sharding its G axis keeps every head whole under tensor parallelism.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD, rope, mask_BxTxS, kv=None, start_B=None, chain=None):
        """Attention in one of three forms, by what is given.

        Nothing: rows attend to each other. `kv` and `start_B`: rows are written into the cache
        pair kv (BxGxSxK each) at slots start_B.. and attend to it. `kv` and `chain`: rows attend
        to kv unchanged, and each to its own entries of chain and to itself.

        Returns (y_BxTxD, kv): the updated cache, or these rows' own (k, v), BxGxTxK each.
        """
        c = self.config
        G, K = c.num_kv_heads, c.head_dim
        R = c.num_heads // G
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        qkv = linear(x_BxTxD, self.param("qkv", init, (x_BxTxD.shape[-1], G, R + 2, K)))
        if c.qkv_bias:
            bias = self.param("qkv_bias", nn.initializers.zeros, (G, R + 2, K))
            qkv = qkv + bias.astype(qkv.dtype)
        q, k, v = qkv[..., :R, :], qkv[..., R, :], qkv[..., R + 1, :]
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        B, T = x_BxTxD.shape[:2]
        q = rotate(q.reshape(B, T, G * R, K), *rope).reshape(B, T, G, R, K)
        k = rotate(k, *rope).transpose(0, 2, 1, 3)
        v = v.transpose(0, 2, 1, 3)
        if chain is not None:
            out = attend(q, *kv, mask_BxTxS, (*chain, (k, v)))
            kv = k, v
        else:
            if kv is not None:
                k, v = write_rows(kv[0], k, start_B), write_rows(kv[1], v, start_B)
            out = attend(q, k.astype(q.dtype), v.astype(q.dtype), mask_BxTxS)
            kv = k, v
        init = nn.initializers.lecun_normal()
        y_BxTxD = linear(out, self.param("o", init, (G * R * K, c.hidden_size)))
        if c.o_bias:
            bias = self.param("o_bias", nn.initializers.zeros, (c.hidden_size,))
            y_BxTxD = y_BxTxD + bias.astype(y_BxTxD.dtype)
        return y_BxTxD, kv


class MLP(nn.Module):
    """SwiGLU; gate and up come from one Dx2xF matrix. With `outputs` > 1 it is outputs * D wide."""

    intermediate_size: int
    outputs: int = 1

    @nn.compact
    def __call__(self, x_BxTxD):
        D, F = x_BxTxD.shape[-1], self.intermediate_size
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        hidden = linear(x_BxTxD, self.param("gate_up", init, (D, 2, F)))
        hidden = jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
        down = self.param("down", nn.initializers.lecun_normal(), (F, self.outputs * D))
        return linear(hidden, down)


_recomputing = contextvars.ContextVar("recomputing", default=False)


@contextlib.contextmanager
def recomputed_layers():
    """Gradients of what is traced within recompute every `Layer` instead of keeping its insides.

    Of each layer only the inputs outlive the forward pass, at the price of running it twice.
    """
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)


class Layer(nn.Module):
    """A module of which a stack is made: (states BxTxD, ...) -> (states, key/value cache).

    `recomputed_layers` takes it as one piece, and a mesh splits what it passes on by rows.
    """

    @nn.nowrap
    def apply(self, variables, *args, **kwargs):
        run = super().apply
        if _recomputing.get():
            run = jax.checkpoint(run)
        states, kv = run(variables, *args, **kwargs)
        return jax.tree.map(rows_over_mesh, states), kv


class Block(Layer):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + mlp(norm(x)).

    With `outputs` > 1 the MLP ends in as many parts, each added to the same residual: a tuple.
    """

    config: ModelConfig
    outputs: int = 1

    @nn.compact
    def __call__(self, x_BxTxD, rope, mask_BxTxS, kv=None, start_B=None, chain=None):
        eps = self.config.rms_norm_eps
        with jax.named_scope("attention"):
            normed = RMSNorm(eps, name="attn_norm")(x_BxTxD)
            attention = Attention(self.config, name="attn")
            y, kv = attention(normed, rope, mask_BxTxS, kv, start_B, chain)
            x_BxTxD = x_BxTxD + y
        with jax.named_scope("mlp"):
            normed = RMSNorm(eps, name="mlp_norm")(x_BxTxD)
            y = MLP(self.config.intermediate_size, self.outputs, name="mlp")(normed)
            if self.outputs == 1:
                return x_BxTxD + y, kv
            return tuple(x_BxTxD + part for part in jnp.split(y, self.outputs, axis=-1)), kv
