"""DFlash: a block of mask tokens, denoised in one pass beside the target's features.

Source: arXiv 2602.06036 and its released model. A block is the root and N mask tokens. Every layer
projects the fused target features of the committed tokens with its own key and value weights;
queries come from the block alone, whose rows see all committed rows and each other in both
directions. Row i reads out the token i places after the root with the target's frozen head, and
nothing drafted is fed back: the depths are independent given the context, as in FastEagle.

A layer has a decoder layer's weights; the same key and value weights serve the features and, after
the layer's norm, the block. The features are the same in every layer, so the cache of a committed
row needs no forward: a round projects the newly committed rows and runs the block, whose own keys
and values are scratch.

Our choices: the mask token is a learnt row, since a target need not have a token to spare (the
release reads the target's embedding of one, which is the same model with that row); one RMSNorm a
tap before the fusion, as in the other feature drafters; a smaller `draft_depth` reads out fewer
rows of the whole block, because a shorter block is another model than the one trained.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from specjax.cache import KVCache, causal_cache_mask, empty_cache, tree_cache_mask
from specjax.drafters.features import FeatureDrafter, FeatureState
from specjax.drafters.parallel import BackboneDrafter
from specjax.models.layers import Attention, Block, RMSNorm
from specjax.models.transformer import embedded, text_layout


@dataclasses.dataclass(frozen=True)
class DFlash(BackboneDrafter, FeatureDrafter):
    """Block-diffusion drafter on a backbone-expansion tree."""

    name: ClassVar[str] = "dflash"
    partition: ClassVar = (("mask", (None,)), *FeatureDrafter.partition)

    num_layers: int = 5
    block_size: int = 16  # the root and N = block_size - 1 mask tokens
    draft_depth: int = 0  # levels read out when drafting; 0 = all N
    anchors: int = 16  # roots whose blocks `teach` runs at once: memory against speed, no more

    def __post_init__(self):
        super().__post_init__()
        if self.num_layers < 1 or self.anchors < 1:
            raise ValueError("num_layers and anchors: must be at least 1")
        if self.block_size < 2:
            raise ValueError(f"block_size: {self.block_size} must be at least 2, root included")
        if not 0 <= self.draft_depth < self.block_size:
            raise ValueError(
                f"draft_depth: {self.draft_depth} must be in [0, {self.block_size - 1}], below "
                f"block_size={self.block_size}"
            )

    @property
    def depth(self) -> int:
        return self.draft_depth or self.unrolled

    @property
    def unrolled(self) -> int:
        return self.block_size - 1

    @property
    def scratch(self) -> int:
        return self.block_size

    @property
    def cache_layers(self) -> int:
        return self.num_layers

    def init(self, key, target_params):
        common_key, mask_key, *layer_keys = jax.random.split(key, self.num_layers + 2)
        D, embed = self.target.hidden_size, target_params["embed"].astype(jnp.float32)
        x, sees = jnp.zeros((1, 1, D)), jnp.ones((1, 1, 1), bool)
        rope = self.rope(jnp.zeros((1, 1), jnp.int32))
        layer = Block(self.block)
        return self.init_common(common_key, target_params) | {
            "context_norm": {"scale": jnp.ones(D)},
            # A token like any other, as far as its size tells.
            "mask": jnp.sqrt(jnp.mean(embed**2)) * jax.random.normal(mask_key, (D,)),
            "layers": [layer.init(k, x, rope, sees)["params"] for k in layer_keys],
        }

    # ---- the two kinds of rows -------------------------------------------------------------------

    def forward_rows(self, params, target_params, taps, tokens, positions, mask, cache):
        """Writes the context rows' keys and values; such rows have no hidden states."""
        c = self.block
        g = self.fuse(params, taps)
        g = RMSNorm(c.rms_norm_eps).apply({"params": params["context_norm"]}, g)
        attention, rope = Attention(c), self.rope(positions)
        kvs = []
        for layer, *kv in zip(params["layers"], cache.k, cache.v, strict=True):
            # Only keys and values are kept; what these rows would attend to is not compiled.
            _, kv = attention.apply({"params": layer["attn"]}, g, rope, mask, kv, cache.lengths_B)
            kvs.append(kv)
        return [], _with_rows(cache, kvs)

    def denoise(self, params, target_params, roots_BxA, positions_BxA, mask, cache):
        """Runs the blocks of A roots a sequence; returns (hidden BxAxMxD, M = block_size, cache).

        Args:
          roots_BxA: int32 tokens.
          positions_BxA: the roots' RoPE positions.
          mask: BxRxS, what the R = A * M rows see of the cache's slots, in which they themselves
            take those from its lengths on.
        """
        B, A = roots_BxA.shape
        M, D = self.block_size, self.target.hidden_size
        x_BxAxD = jax.lax.stop_gradient(embedded(target_params, roots_BxA))
        masks = jnp.broadcast_to(params["mask"].astype(x_BxAxD.dtype), (B, A, M - 1, D))
        x = jnp.concatenate([x_BxAxD[:, :, None], masks], axis=2).reshape(B, A * M, D)
        rope = self.rope((positions_BxA[..., None] + jnp.arange(M)).reshape(B, A * M))
        layer, kvs = Block(self.block), []
        for i, (weights, *kv) in enumerate(zip(params["layers"], cache.k, cache.v, strict=True)):
            with jax.named_scope(f"block_{i}"):
                x, kv = layer.apply({"params": weights}, x, rope, mask, kv, cache.lengths_B)
            kvs.append(kv)
        return x.reshape(B, A, M, D), _with_rows(cache, kvs)

    # ---- training --------------------------------------------------------------------------------

    def unroll(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        """Every row's token is the root of a block, which sees the features up to that row.

        The context rows are projected once. Blocks run `anchors` at a time and are recomputed in
        the backward pass, so with R = anchors * block_size the largest arrays are the attention
        weights of R rows over T + R slots, BxHxRx(T+R) a layer, for one piece at a time; besides
        them stay the keys and values of T rows a layer, and the result, BxTxNxD. Blocks of one
        piece do not see each other: more anchors at once mean more idle columns, R of T + R.
        """
        B, T = tokens_BxT.shape
        M, A = self.block_size, min(self.anchors, T)
        R, pieces = A * M, -(-T // A)
        cache = empty_cache(self.block, B, T + R, taps_BxTxM.dtype, self.cache_layers)
        positions, mask = text_layout(tokens_BxT, segments_BxT)
        causal = causal_cache_mask(cache.lengths_B, T, cache.slots)
        _, cache = self.forward_rows(
            params, target_params, taps_BxTxM, tokens_BxT, positions, causal, cache
        )
        cache = cache.replace(lengths_B=jnp.full(B, T, jnp.int32))
        roots = jnp.pad(tokens_BxT, ((0, 0), (0, pieces * A - T)))
        block_R = jnp.arange(R) // M
        same_block_RxR = block_R[:, None] == block_R

        @jax.checkpoint
        def piece(start):
            row_A = jnp.minimum(start + jnp.arange(A), T - 1)  # what pads the last piece is cut off
            context = jnp.repeat(mask[:, row_A], M, axis=1)  # a text's own rows up to the root's
            same_block = jnp.broadcast_to(same_block_RxR, (len(context), R, R))
            hidden_BxAxMxD, _ = self.denoise(
                params,
                target_params,
                jax.lax.dynamic_slice_in_dim(roots, start, A, axis=1),
                positions[:, row_A] + 1,
                jnp.concatenate([context, same_block], axis=2),
                cache,
            )
            return hidden_BxAxMxD[:, :, 1:]

        hidden = jax.lax.map(piece, jnp.arange(0, pieces * A, A))
        hidden = jnp.moveaxis(hidden, 0, 1).reshape(B, pieces * A, M - 1, -1)[:, :T]
        hidden = [hidden[:, :, i] for i in range(M - 1)]
        return hidden, hidden

    # ---- drafting --------------------------------------------------------------------------------

    def draft(self, params, target_params, state: FeatureState, context, key):
        _, cache = self.extend(params, target_params, state.cache, state.pending)
        root_B, start_B = context.root_B(), cache.lengths_B
        whole_block = jnp.ones((self.block_size, self.block_size), bool)
        mask = tree_cache_mask(start_B, whole_block, cache.slots)
        hidden_Bx1xMxD, cache = self.denoise(
            params, target_params, root_B[:, None], start_B[:, None], mask, cache
        )
        rows_BxNxD = hidden_Bx1xMxD[:, 0, 1 : 1 + self.depth]
        tree = self.draw_tree(params, target_params, rows_BxNxD, root_B, key)
        return tree, state.replace(cache=cache)


def _with_rows(cache: KVCache, kvs) -> KVCache:
    """The cache with each layer's (k, v)."""
    return cache.replace(k=tuple(k for k, _ in kvs), v=tuple(v for _, v in kvs))
