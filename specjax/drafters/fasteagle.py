"""FastEagle: a cascade of N light decoder layers that drafts N tokens in one pass.

Source: arXiv 2509.20416 for the cascade, its supervision and a constrained tree; no code is public,
and the equations are as a third party's review of the paper gives them: g = FC(low, mid, high);
h_1 = L_1(FC(g, e)); h_i = L_i(h_{i-1}); q_i = softmax(head(h_i)), the head the target's, frozen.
Layer i reads out the token i places after the root. Nothing a layer drafts is fed back, so the
drafter never sees its own tokens: no tree mask, no rollback, and training sees exactly what
decoding sees.

Our choices, which no source settles: N; the tree below its first level (every level has C
candidates, only the first of them has children); the loss and its weights by depth, and the rule
above temperature 0, both in configs/fasteagle.py; RMSNorm on g and e before the entry; a norm
before the readout, one for all depths, started from the target's final norm; full head by default;
the target's embedding, frozen. The layers start at random: copies of the target's last layers,
rescaled to the drafter's residual stream, trained no better on the built-in target (cross-entropy
at depth 1 after the same 120 steps: 3.97 nats against 3.74).

FSPAD (arXiv 2408.15562) maps onto the cascade in two parts. Feature sampling, `entry="sampled"`:
the next token's embedding gates a readout of the fused entry; deeper layers have no new token.
Partial alignment, `partial_alignment`: every layer's MLP ends in two halves on one residual, o_i
for the head and r_i for the feature loss, and r_i is what the next layer reads.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from specjax.drafters.features import (
    FeatureDrafter,
    FeatureState,
    MidLayer,
    last_rows,
)
from specjax.drafters.parallel import BackboneDrafter
from specjax.models.layers import Block, RMSNorm
from specjax.models.linear import linear
from specjax.models.transformer import embedded, text_layout

ENTRIES = ("fc2h", "wide_qkv", "sampled")


@dataclasses.dataclass(frozen=True)
class FastEagle(BackboneDrafter, FeatureDrafter):
    """Single-pass cascade drafter on a backbone-expansion tree."""

    name: ClassVar[str] = "fasteagle"
    partition: ClassVar = (
        ("sampling/(gate|up)", ("fsdp", "tensor")),
        ("entry|sampling/down", ("tensor", "fsdp")),
        *FeatureDrafter.partition,
    )

    num_layers: int = 7  # N: trained depth
    # "fc2h": FC over [norm(g), norm(e)]; "wide_qkv": EAGLE-3's 2D-wide layer; "sampled": fc2h, then
    # x + down(silu(gate(norm(e))) * up(norm(x))), FSPAD's feature sampling
    entry: str = "fc2h"
    partial_alignment: bool = False  # FSPAD: separate outputs for the head and for the next layer
    draft_depth: int = 0  # levels used when drafting; 0 = all N

    def __post_init__(self):
        super().__post_init__()
        if self.entry not in ENTRIES:
            raise ValueError(f"entry: {self.entry!r} is unknown; one of {ENTRIES}")
        if self.partial_alignment and self.entry == "wide_qkv":
            raise ValueError("partial_alignment: entry 'wide_qkv' has no split layer")
        if self.num_layers < 1:
            raise ValueError(f"num_layers: {self.num_layers} must be at least 1")
        if not 0 <= self.draft_depth <= self.num_layers:
            raise ValueError(
                f"draft_depth: {self.draft_depth} must be in [0, num_layers={self.num_layers}]"
            )

    @property
    def depth(self) -> int:
        return self.draft_depth or self.num_layers

    @property
    def cache_layers(self) -> int:
        return self.depth

    def init(self, key, target_params):
        keys = jax.random.split(key, self.num_layers + 2)
        D = self.target.hidden_size
        params = self.init_common(keys[0], target_params)
        x, mask = jnp.zeros((1, 1, D)), jnp.ones((1, 1, 1), bool)
        rope = self.rope(jnp.zeros((1, 1), jnp.int32))
        layers = [self._layer.init(k, x, rope, mask)["params"] for k in keys[2:]]
        if self.entry == "wide_qkv":
            layers[0] = MidLayer(self.block).init(keys[2], x, x, rope, mask)["params"]
            return params | {"layers": layers}
        params["entry"] = _lecun(keys[1], 2 * D, D)
        params["g_norm"] = {"scale": jnp.ones(D)}
        params["e_norm"] = {"scale": jnp.ones(D)}
        if self.entry == "sampled":
            F = self.block.intermediate_size
            shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
            sampling_keys = jax.random.split(jax.random.fold_in(keys[1], 1), len(shapes))
            pairs = zip(sampling_keys, shapes.items(), strict=True)
            params["sampling"] = {name: _lecun(k, *shape) for k, (name, shape) in pairs}
            params["sampling"]["norm"] = {"scale": jnp.ones(D)}
        return params | {"layers": layers}

    @property
    def _layer(self):
        return Block(self.block, outputs=2 if self.partial_alignment else 1)

    def _enter(self, params, g, e):
        """Features and next-token embedding -> the first layer's input."""
        norm = RMSNorm(self.target.rms_norm_eps)
        g = norm.apply({"params": params["g_norm"]}, g)
        e = norm.apply({"params": params["e_norm"]}, e)
        x = linear(jnp.concatenate([g, e], axis=-1), params["entry"])
        if self.entry == "sampled":
            own = params["sampling"]
            up = linear(norm.apply({"params": own["norm"]}, x), own["up"])
            x = x + linear(jax.nn.silu(linear(e, own["gate"])) * up, own["down"])
        return x

    def forward_rows(self, params, target_params, taps, tokens, positions, mask, cache):
        hidden, _, cache = self._cascade(
            params, target_params, taps, tokens, positions, mask, cache
        )
        return hidden, cache

    def _cascade(self, params, target_params, taps, tokens, positions, mask, cache):
        """(hidden per depth for the head, what each layer hands on, cache)."""
        g = self.fuse(params, taps)
        e = jax.lax.stop_gradient(embedded(target_params, tokens)).astype(g.dtype)
        rope = self.rope(positions)
        start_B = None if cache is None else cache.lengths_B
        hidden, handed, ks, vs, block = [], [], [], [], self._layer
        x = None if self.entry == "wide_qkv" else self._enter(params, g, e)
        for i, layer in enumerate(params["layers"][: self.depth]):
            kv = None if cache is None else (cache.k[i], cache.v[i])
            with jax.named_scope(f"cascade_{i}"):
                if x is None:
                    middle = MidLayer(self.block)
                    x, kv = middle.apply({"params": layer}, g, e, rope, mask, kv, start_B)
                else:
                    x, kv = block.apply({"params": layer}, x, rope, mask, kv, start_B)
            read, x = x if self.partial_alignment else (x, x)
            hidden.append(read)
            handed.append(x)
            ks.append(kv[0])
            vs.append(kv[1])
        if cache is not None:
            cache = cache.replace(k=tuple(ks), v=tuple(vs))
        return hidden, handed, cache

    def unroll(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        positions, mask = text_layout(tokens_BxT, segments_BxT)
        hidden, handed, _ = self._cascade(
            params, target_params, taps_BxTxM, tokens_BxT, positions, mask, None
        )
        return hidden, handed

    def draft(self, params, target_params, state: FeatureState, context, key):
        hidden, cache = self.extend(params, target_params, state.cache, state.pending)
        rows_BxNxD = jnp.stack([last_rows(h, state.pending.counts_B) for h in hidden], axis=1)
        tree = self.draw_tree(params, target_params, rows_BxNxD, context.root_B(), key)
        return tree, state.replace(cache=cache)


def _lecun(key, fan_in: int, fan_out: int):
    return jax.random.normal(key, (fan_in, fan_out)) * fan_in**-0.5
