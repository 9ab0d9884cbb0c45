"""Kangaroo: the target's own first layers and a small adapter draft token by token.

Source: arXiv 2404.18911 and its released code. Two early exits. A drafted token leaves the target
after `exit_layer` layers; the residual stream there goes through the adapter, an attention layer
without an MLP, and is read out with the target's LM head after a norm of its own. And a draft ends
after the first token less probable than `threshold`, which is still verified. Only the adapter and
its norm are trained, against the target's distribution at the same position.

Our choices. The early layers' keys and values of committed tokens lie in the drafter's cache beside
the adapter's, and verification runs the whole target. The released code shares them with the
target's cache and resumes verification at the exit, which saves `exit_layer` of the target's layers
over the rows of a tree and as much of prefill and cache; here no drafter touches the target's
cache, and every rule, batch and driver works as for the others. At temperature above 0 the
probability that ends a draft is that of the token drawn, before top-k and top-p (released: greedy,
one request at a time). The adapter has the target's heads, grouped ones where the target's are, and
starts at random; its norm starts as the target's final norm.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from specjax.cache import KVCache, empty_cache
from specjax.drafters.chain import ChainDrafter
from specjax.models.config import ModelConfig
from specjax.models.layers import Attention, Block, Layer, RMSNorm
from specjax.models.rope import rope_tables
from specjax.models.transformer import (
    embedded,
    head_VxD,
    is_stacked,
    precision_of,
    unstack_layers,
)


class Adapter(Layer):
    """x + attention(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD, rope, mask, kv=None, start_B=None):
        normed = RMSNorm(self.config.rms_norm_eps, name="attn_norm")(x_BxTxD)
        y, kv = Attention(self.config, name="attn")(normed, rope, mask, kv, start_B)
        return x_BxTxD + y, kv


@dataclasses.dataclass(frozen=True)
class Kangaroo(ChainDrafter):
    """Self-speculation from an early exit of the target."""

    name: ClassVar[str] = "kangaroo"
    policies: ClassVar[tuple[str, ...]] = ("fixed", "confidence")

    exit_layer: int = 2  # E: target layers that draft (2 of 32 and 3 of 40 in the paper)
    draft_depth: int = 6
    stop: str = "confidence"
    threshold: float = 0.6

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.exit_layer <= self.target.num_layers:
            raise ValueError(
                f"exit_layer: {self.exit_layer} must be in [1, {self.target.num_layers}], the "
                "target's layers"
            )

    def init(self, key, target_params):
        x, mask = jnp.zeros((1, 1, self.target.hidden_size)), jnp.ones((1, 1, 1), bool)
        rope = rope_tables(self.target, jnp.zeros((1, 1), jnp.int32))
        return {
            # A list of one: sharding rules know the kernels of layers by their path.
            "layers": [Adapter(self.target).init(key, x, rope, mask)["params"]],
            "norm": {"scale": target_params["final_norm"]["scale"].astype(jnp.float32)},
        }

    def init_state(self, batch: int, slots: int, dtype) -> KVCache:
        return empty_cache(self.target, batch, slots, dtype, self.exit_layer + 1)

    def states(self, params, target_params, tokens_BxT, positions_BxT, mask, cache=None):
        E, start_B = self.exit_layer, None if cache is None else cache.lengths_B
        kvs = [None] * (E + 1) if cache is None else list(zip(cache.k, cache.v, strict=True))
        rope, block = rope_tables(self.target, positions_BxT), Block(self.target)
        if is_stacked(target_params):
            target_params = unstack_layers(target_params)
        with jax.named_scope("early_layers"), precision_of(target_params):
            x = embedded(target_params, tokens_BxT)
            for i, layer in enumerate(target_params["layers"][:E]):
                x, kvs[i] = block.apply({"params": layer}, x, rope, mask, kvs[i], start_B)
        x, adapter = jax.lax.stop_gradient(x), {"params": params["layers"][0]}
        with jax.named_scope("adapter"):
            x, kvs[E] = Adapter(self.target).apply(adapter, x, rope, mask, kvs[E], start_B)
        if cache is not None:
            ks, vs = zip(*kvs, strict=True)
            cache = cache.replace(k=ks, v=vs)
        return x, cache

    def normed(self, params, hidden):
        return RMSNorm(self.target.rms_norm_eps).apply({"params": params["norm"]}, hidden)

    def head(self, params, target_params):
        return jax.lax.stop_gradient(head_VxD(target_params))
