"""What drafters on target features share: taps fused, a cache of committed rows, a readout.

Row p of such a drafter holds (features of x_p, embedding of x_{p+1}) at RoPE position p. Only
committed tokens with true features enter its cache. Verification leaves the newly committed rows
pending; the next draft extends over all of them at once.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from specjax.cache import KVCache, causal_cache_mask, empty_cache
from specjax.drafters.base import Committed
from specjax.drafters.learned import LearnedDrafter
from specjax.models.config import ModelConfig
from specjax.models.layers import MLP, Attention, Layer, RMSNorm
from specjax.models.linear import linear
from specjax.models.rope import rope_tables


@flax.struct.dataclass
class FeatureState:
    """Cache of committed rows plus the rows that the next draft will extend over."""

    cache: KVCache
    pending: Committed  # A = depth + 1


class MidLayer(Layer):
    """EAGLE-3's layer: attention reads [norm(e), norm(g)] (2D wide), the residual is g itself.

    Source: arXiv 2503.01840 and its released code.
    """

    config: ModelConfig
    norm_before_residual: bool = False  # the residual is norm(g)

    @nn.compact
    def __call__(self, g_BxTxD, e_BxTxD, rope, mask, kv=None, start_B=None, chain=None):
        c = self.config
        e = RMSNorm(c.rms_norm_eps, name="input_norm")(e_BxTxD)
        g = RMSNorm(c.rms_norm_eps, name="hidden_norm")(g_BxTxD)
        attention = Attention(c, name="attn")
        y, kv = attention(jnp.concatenate([e, g], -1), rope, mask, kv, start_B, chain)
        x = (g if self.norm_before_residual else g_BxTxD) + y
        x = x + MLP(c.intermediate_size, name="mlp")(RMSNorm(c.rms_norm_eps, name="mlp_norm")(x))
        return x, kv


@dataclasses.dataclass(frozen=True)
class FeatureDrafter(LearnedDrafter):
    """Drafter over the target's tapped features, with layers of the target's family."""

    partition: ClassVar = (("fc", ("tensor", "fsdp")), *LearnedDrafter.partition)

    feature_layers: tuple[int, ...] = ()  # () = the target's low, mid and high taps
    intermediate_size: int = 0  # 0 = the target's
    num_heads: int = 0  # 0 = the target's
    num_kv_heads: int = 0

    def __post_init__(self):
        super().__post_init__()
        L = self.target.num_layers
        if any(not 0 <= layer <= L for layer in self.feature_layers):
            raise ValueError(f"feature_layers: {self.feature_layers} must lie in [0, {L}]")

    @property
    def taps(self) -> tuple[int, ...]:
        return self.feature_layers or self.target.feature_layers()

    @property
    def block(self) -> ModelConfig:
        """Geometry of one drafter layer."""
        return self.target.replace(
            intermediate_size=self.intermediate_size or self.target.intermediate_size,
            num_heads=self.num_heads or self.target.num_heads,
            num_kv_heads=self.num_kv_heads or self.target.num_kv_heads,
        )

    @property
    def cache_layers(self) -> int:
        """Layers that keep keys and values."""
        raise NotImplementedError

    def forward_rows(self, params, target_params, taps, tokens, positions, mask, cache):
        """Runs rows through the drafter's layers; returns (hidden per depth, cache)."""
        raise NotImplementedError

    def unroll(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        """`teach` with each row's own inputs: features g_t and tokens_BxT[:, t] = x_{t+1}."""
        raise NotImplementedError

    def teach(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        following = jnp.pad(tokens_BxT[:, 1:], ((0, 0), (0, 1)))  # the last row has no label
        return self.unroll(params, target_params, taps_BxTxM, following, segments_BxT)

    # ---- state -------------------------------------------------------------------------------

    def init_state(self, batch: int, slots: int, dtype) -> FeatureState:
        A, M = self.depth + 1, len(self.taps) * self.target.hidden_size
        pending = Committed(
            jnp.zeros((batch, A), jnp.int32),
            jnp.zeros((batch, A, M), dtype),
            jnp.zeros(batch, jnp.int32),
        )
        return FeatureState(
            empty_cache(self.block, batch, slots, dtype, self.cache_layers), pending
        )

    def prefill(self, params, target_params, state, committed, context) -> FeatureState:
        B, P = committed.tokens_BxA.shape
        begin_B = context.begin_B(committed)
        cache = state.cache.replace(lengths_B=begin_B)
        _, cache = self.extend(params, target_params, cache, committed)
        # The prompt's last row stays pending: the first draft reads out there.
        last_B = committed.counts_B - 1
        pick = jax.vmap(lambda rows, i: jax.lax.dynamic_slice_in_dim(rows, i, 1))
        pending = state.pending.replace(
            tokens_BxA=state.pending.tokens_BxA.at[:, :1].set(pick(committed.tokens_BxA, last_B)),
            taps_BxAxM=state.pending.taps_BxAxM.at[:, :1].set(pick(committed.taps_BxAxM, last_B)),
            counts_B=jnp.ones(B, jnp.int32),
        )
        return FeatureState(cache.replace(lengths_B=begin_B + last_B), pending)

    def absorb(self, params, state, committed: Committed, tree, scored) -> FeatureState:
        return state.replace(pending=committed)

    def extend(self, params, target_params, cache: KVCache, rows: Committed):
        """Runs newly committed rows; returns (hidden per depth, cache)."""
        A = rows.tokens_BxA.shape[1]
        positions = cache.lengths_B[:, None] + jnp.arange(A, dtype=jnp.int32)
        mask = causal_cache_mask(cache.lengths_B, A, cache.slots)
        hidden, cache = self.forward_rows(
            params, target_params, rows.taps_BxAxM, rows.tokens_BxA, positions, mask, cache
        )
        return hidden, cache.replace(lengths_B=cache.lengths_B + rows.counts_B)

    # ---- shared pieces -----------------------------------------------------------------------

    def fuse(self, params, taps_BxTxM):
        """g = FC(norm(low), norm(mid), norm(high)).

        Residual streams grow by orders of magnitude over depth and between targets; one RMSNorm per
        tap (EAGLE-3.1's fc_norm) makes the drafter's own weights start at one scale everywhere.
        Parameters without "fc_norm" fuse the taps as they are, as EAGLE-3 was released.
        """
        if "fc_norm" not in params:
            return linear(taps_BxTxM, params["fc"])
        B, T, M = taps_BxTxM.shape
        norm = RMSNorm(self.block.rms_norm_eps)
        split = taps_BxTxM.reshape(B, T, len(self.taps), -1)
        normed = [
            norm.apply({"params": scale}, split[:, :, i])
            for i, scale in enumerate(params["fc_norm"])
        ]
        return linear(jnp.concatenate(normed, axis=-1), params["fc"])

    def rope(self, positions_BxT):
        """RoPE tables at the rows' positions."""
        return rope_tables(self.block, positions_BxT)

    def init_common(self, key, target_params) -> dict[str, Any]:
        """fc and norm, and the draft vocabulary's ids (the lowest, until data says otherwise)."""
        D, taps = self.target.hidden_size, len(self.taps)
        # Start at the highest tap, the features closest to the next token; the rest is small.
        noise = jax.random.normal(key, (taps * D, D)) * (0.1 / np.sqrt(taps * D))
        identity = jnp.concatenate([jnp.zeros(((taps - 1) * D, D)), jnp.eye(D)])
        params = {
            "fc": identity + noise,
            "fc_norm": [{"scale": jnp.ones(D)} for _ in self.taps],
            "norm": {"scale": target_params["final_norm"]["scale"].astype(jnp.float32)},
        }
        if self.draft_vocab_size:
            params["buffers"] = {"vocab_ids": jnp.arange(self.draft_vocab_size, dtype=jnp.int32)}
        return params

    def normed(self, params, hidden):
        return RMSNorm(self.block.rms_norm_eps).apply({"params": params["norm"]}, hidden)


def last_rows(hidden_BxAxD, counts_B):
    """The last valid row of each sequence: BxD."""
    return jax.vmap(lambda rows, n: rows[n - 1])(hidden_BxAxD, counts_B)
