"""P-EAGLE: EAGLE-3's inputs, and one pass over as many rows as there are tokens to draft.

Source: arXiv 2602.01469. The first of N rows holds the newest true features and token, as in
EAGLE-3; the rest hold a learnt mask embedding and learnt features, the same in each, and only their
positions tell them apart. All go through all layers (the first 2D wide, as EAGLE-3's) at once: a
row attends to committed rows and to earlier rows of its own draft, and row i drafts the token i
places after the root. Nothing drafted is fed back, so a draft is one pass and training is exact.

Rows of a draft lie right behind the committed ones: the pending true rows first, then mask rows.
One causal mask and consecutive positions say all of the above, and since mask rows are written past
the committed length, the next round overwrites them: only true rows stay in the cache.

Our choices. Embedding and head are the target's, frozen, as FastEagle's (the paper trains
embeddings); the mask row has an embedding of its own and learnt features as wide as the taps, which
go through the same fusion as true ones. The readout norm starts from the target's final norm.
Every position trains every depth: the paper thins out positions with depth, to train in less
memory, but blocks of diagonal keys need none of the N x T square. No depth decay, as in the paper,
is the recipe's (configs/p_eagle.py).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from specjax.cache import causal_cache_mask
from specjax.drafters.features import FeatureDrafter, FeatureState, MidLayer
from specjax.drafters.parallel import BackboneDrafter
from specjax.models.layers import Block
from specjax.models.transformer import embedded, text_layout


@dataclasses.dataclass(frozen=True)
class PEagle(BackboneDrafter, FeatureDrafter):
    """One pass over one true and N - 1 mask rows, on a backbone-expansion tree."""

    name: ClassVar[str] = "p_eagle"
    partition: ClassVar = (("mask_token|mask_hidden", (None,)), *FeatureDrafter.partition)

    num_layers: int = 4
    draft_depth: int = 7  # N: rows of a draft, and depths trained; parameters fit any

    def __post_init__(self):
        super().__post_init__()
        for field in ("num_layers", "draft_depth"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: {getattr(self, field)} must be at least 1")

    @property
    def depth(self) -> int:
        return self.draft_depth

    @property
    def scratch(self) -> int:
        return 2 * self.depth  # depth + 1 pending rows, depth - 1 mask rows

    @property
    def cache_layers(self) -> int:
        return self.num_layers

    def init(self, key, target_params):
        common_key, token_key, hidden_key, *layer_keys = jax.random.split(key, 3 + self.num_layers)
        D = self.target.hidden_size
        x, mask = jnp.zeros((1, 1, D)), jnp.ones((1, 1, 1), bool)
        rope, block = self.rope(jnp.zeros((1, 1), jnp.int32)), Block(self.block)
        layers = [MidLayer(self.block).init(layer_keys[0], x, x, rope, mask)["params"]]
        layers += [block.init(k, x, rope, mask)["params"] for k in layer_keys[1:]]
        # Both are normed before anything reads them: only their directions count.
        return self.init_common(common_key, target_params) | {
            "layers": layers,
            "mask_token": jax.random.normal(token_key, (D,)),
            "mask_hidden": jax.random.normal(hidden_key, (len(self.taps) * D,)),
        }

    def _true_rows(self, params, target_params, taps_BxTxM, tokens_BxT):
        """(g, e) of rows with true features and tokens."""
        g = self.fuse(params, taps_BxTxM)
        return g, jax.lax.stop_gradient(embedded(target_params, tokens_BxT)).astype(g.dtype)

    def _mask_row(self, params, dtype):
        """(g, e) of a mask row, 1x1xD each."""
        g = self.fuse(params, params["mask_hidden"].astype(dtype)[None, None])
        return g, params["mask_token"].astype(g.dtype)[None, None]

    def _layers(self, params, g, e, positions, mask, kvs=None, start_B=None, chains=None):
        """All layers over rows (g, e): (hidden, (k, v) of each layer); see `Attention`."""
        rope, block, out, x = self.rope(positions), Block(self.block), [], None
        for i, layer in enumerate(params["layers"]):
            rest = (rope, mask, kvs and kvs[i], start_B, chains and chains[i])
            with jax.named_scope(f"layer_{i}"):
                if i == 0:
                    x, kv = MidLayer(self.block).apply({"params": layer}, g, e, *rest)
                else:
                    x, kv = block.apply({"params": layer}, x, *rest)
            out.append(kv)
        return x, out

    def _cached(self, params, g, e, positions, mask, cache):
        """`_layers` over rows written behind the committed ones: (hidden, cache)."""
        kvs = list(zip(cache.k, cache.v, strict=True))
        x, kvs = self._layers(params, g, e, positions, mask, kvs, cache.lengths_B)
        ks, vs = zip(*kvs, strict=True)
        return x, cache.replace(k=ks, v=vs)

    def forward_rows(self, params, target_params, taps, tokens, positions, mask, cache):
        g, e = self._true_rows(params, target_params, taps, tokens)
        x, cache = self._cached(params, g, e, positions, mask, cache)
        return [x], cache

    def draft(self, params, target_params, state: FeatureState, context, key):
        cache, pending, N = state.cache, state.pending, self.depth
        true_rows = self._true_rows(params, target_params, pending.taps_BxAxM, pending.tokens_BxA)
        mask_row = self._mask_row(params, pending.taps_BxAxM.dtype)
        rows = jnp.arange(pending.tokens_BxA.shape[1] + N - 1, dtype=jnp.int32)
        true_BxRx1 = (rows < pending.counts_B[:, None])[..., None]
        more = lambda x: jnp.pad(x, ((0, 0), (0, N - 1), (0, 0)))  # noqa: E731
        pairs = zip(true_rows, mask_row, strict=True)
        g, e = (jnp.where(true_BxRx1, more(x), m) for x, m in pairs)
        positions = cache.lengths_B[:, None] + rows
        mask = causal_cache_mask(cache.lengths_B, len(rows), cache.slots)
        x, cache = self._cached(params, g, e, positions, mask, cache)
        cache = cache.replace(lengths_B=cache.lengths_B + pending.counts_B)
        # Read out from the last true row on; the mask rows after these nobody reads.
        cut = jax.vmap(lambda rows, n: jax.lax.dynamic_slice_in_dim(rows, n - 1, N))
        rows_BxNxD = cut(x, pending.counts_B)
        tree = self.draw_tree(params, target_params, rows_BxNxD, context.root_B(), key)
        return tree, state.replace(cache=cache)

    def unroll(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        """Row t drafts from true rows <= t: its mask rows see no other row's.

        Depth i is a block of T mask rows, row t's at RoPE position t + i - 1, that attends to the
        true rows' keys as those do, and to its own row's keys in the blocks before.
        """
        positions, mask = text_layout(tokens_BxT, segments_BxT)
        rows = self._true_rows(params, target_params, taps_BxTxM, tokens_BxT)
        x, true = self._layers(params, *rows, positions, mask)
        g, e = (jnp.broadcast_to(m, x.shape) for m in self._mask_row(params, taps_BxTxM.dtype))
        hidden, own = [x], [()] * self.num_layers
        for i in range(1, self.depth):
            x, kvs = self._layers(params, g, e, positions + i, mask, true, chains=own)
            own = [(*before, kv) for before, kv in zip(own, kvs, strict=True)]
            hidden.append(x)
        return hidden, hidden
