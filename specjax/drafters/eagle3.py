"""EAGLE-3: one layer run again and again on its own output, on a dynamic tree or a chain.

Source: arXiv 2503.01840 (EAGLE-3), 2406.16858 (EAGLE-2's dynamic tree) and their released code. One
2D-wide layer, its own head over a draft vocabulary, the layer's output before the final norm fed
back as the next step's features. Trained by unrolling the same recursion ("training-time test").

Our choices: the head starts from the target's rows, the released one at random; the loss averages
over supervised positions, the released one over all.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from specjax.cache import tree_cache_mask
from specjax.drafters.features import (
    FeatureDrafter,
    FeatureState,
    MidLayer,
    last_rows,
)
from specjax.drafters.proposals import KINDS, beam_step, draw_children, log_law
from specjax.models.config import ModelConfig
from specjax.models.transformer import embedded, head_VxD, text_layout
from specjax.sampling import argmax
from specjax.trees import Topology, best_of_pool, branching, chain, tree_of


@dataclasses.dataclass(frozen=True)
class Eagle3(FeatureDrafter):
    """Autoregressive feature drafter; top_k = 1 is a chain, else EAGLE-2's expand and rerank."""

    name: ClassVar[str] = "eagle3"
    steps: int = 7  # unrolled steps when training
    top_k: int = 1  # K: frontier width, and children tried per frontier node
    draft_depth: int = 0  # levels drafted; 0 = steps
    total_nodes: int = 0  # T, root included; 0 = depth + 1 for a chain, 4 * depth for a tree
    # Children of each node by level, when they are sampled (RSD-C); () = stochastic beam search
    branching: tuple[int, ...] = ()
    # Variants of the head, by the names of their config keys elsewhere (docs/interchange.md)
    fc_norm: bool = True  # an RMSNorm per tap before fc
    norm_before_residual: bool = False  # the layer's residual is the normed g
    norm_output: bool = False  # what the layer feeds back is normed
    own_layer: ModelConfig | None = None  # geometry of an imported layer; overrides the fields'

    def __post_init__(self):
        super().__post_init__()
        if self.block.hidden_size != self.target.hidden_size:
            raise ValueError(
                f"own_layer: hidden_size {self.block.hidden_size} must be the target's "
                f"{self.target.hidden_size}"
            )
        if self.steps < 1 or self.top_k < 1 or self.draft_depth < 0:
            raise ValueError("steps, top_k: at least 1; draft_depth: at least 0")
        pool = self.top_k + (self.depth - 1) * self.top_k**2
        if not self.depth < self._budget <= pool + 1:
            raise ValueError(
                f"total_nodes: {self._budget} must be in [{self.depth + 1}, {pool + 1}] for depth "
                f"{self.depth} and top_k {self.top_k}"
            )

        if self.branching and (len(self.branching) != self.depth or min(self.branching) < 1):
            raise ValueError(
                f"branching: {self.branching} must hold one count >= 1 for each of {self.depth} "
                "levels"
            )

    @property
    def proposals(self) -> tuple[str, ...]:
        # Beam search draws without replacement; siblings drawn with it need a shape of their own.
        beam = ("top", "without_replacement", "chains")
        return KINDS if self.branching else beam

    @property
    def block(self) -> ModelConfig:
        return self.own_layer or super().block

    @property
    def depth(self) -> int:
        return self.draft_depth or self.steps

    @property
    def nodes(self) -> int:
        return 1 + sum(self._widths) if self.proposal.sampled else self._budget

    @property
    def _counts(self) -> tuple[int, ...]:
        """Children of each node of a sampled tree by level; () where beam search decides."""
        if self.proposal.kind == "chains":
            return (self._beams, *[1] * (self.depth - 1))
        return self.branching

    @property
    def _beams(self) -> int:
        """Nodes a level, or chains: as many as the node budget feeds."""
        return min(self.top_k, max(1, (self._budget - 1) // self.depth))

    @property
    def _widths(self) -> tuple[int, ...]:
        """Nodes of each level of a sampled tree."""
        if self._counts:
            return tuple(math.prod(self._counts[:level]) for level in range(1, self.depth + 1))
        return (self._beams,) * self.depth

    @property
    def _budget(self) -> int:
        if self.total_nodes:
            return self.total_nodes
        return self.depth + 1 if self.top_k == 1 else 4 * self.depth

    @property
    def topology(self) -> Topology | None:
        if self.proposal.sampled and self._counts:
            return branching(self._counts)
        narrow = self._beams == 1 if self.proposal.sampled else self.top_k == 1
        return chain(self.depth) if narrow else None

    @property
    def scratch(self) -> int:
        drafted = sum(self._widths[:-1]) if self.proposal.sampled else (self.depth - 1) * self.top_k
        return self.depth + 1 + drafted

    @property
    def cache_layers(self) -> int:
        return 1

    @property
    def unrolled(self) -> int:
        return self.steps

    def init(self, key, target_params):
        keys = jax.random.split(key, 2)
        D = self.target.hidden_size
        params = self.init_common(keys[0], target_params)
        if not self.fc_norm:
            del params["fc_norm"]
        x, mask = jnp.zeros((1, 1, D)), jnp.ones((1, 1, 1), bool)
        rope = self.rope(jnp.zeros((1, 1), jnp.int32))
        params["midlayer"] = self._layer.init(keys[1], x, x, rope, mask)["params"]
        params["head"] = self.init_head(target_params, self.vocab_ids(params))
        return params

    def init_head(self, target_params, vocab_ids):
        """The drafter's own head starts from the target's rows of its vocabulary."""
        head = head_VxD(target_params).astype(jnp.float32)
        return head if vocab_ids is None else head[vocab_ids]

    def head(self, params, target_params):
        return params["head"]

    @property
    def _layer(self):
        return MidLayer(self.block, self.norm_before_residual)

    def normed(self, params, hidden):
        return hidden if self.norm_output else super().normed(params, hidden)

    def step(self, params, target_params, g, tokens, positions, mask, kv, start_B=None, chain=None):
        """One pass of the layer over rows (g, embedding of tokens): (what it feeds back, kv)."""
        e = jax.lax.stop_gradient(embedded(target_params, tokens)).astype(g.dtype)
        x, kv = self._layer.apply(
            {"params": params["midlayer"]}, g, e, self.rope(positions), mask, kv, start_B, chain
        )
        return super().normed(params, x) if self.norm_output else x, kv

    def forward_rows(self, params, target_params, taps, tokens, positions, mask, cache):
        g, kv = self.fuse(params, taps), (cache.k[0], cache.v[0])
        x, kv = self.step(params, target_params, g, tokens, positions, mask, kv, cache.lengths_B)
        return [x], cache.replace(k=(kv[0],), v=(kv[1],))

    def unroll(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        """Training-time test.

        Step i feeds the previous step's output with ground-truth x_{t+1+i} at RoPE position t+i; it
        attends to step-0 keys of rows <= t and to its own row's keys of steps 1..i.
        """
        positions, mask = text_layout(tokens_BxT, segments_BxT)
        x = self.fuse(params, taps_BxTxM)
        x, first = self.step(params, target_params, x, tokens_BxT, positions, mask, None)
        hidden, own = [x], ()
        for i in range(1, self.steps):
            tokens = jnp.pad(tokens_BxT[:, i:], ((0, 0), (0, i)))  # rows past the end: masked out
            x, kv = self.step(
                params, target_params, x, tokens, positions + i, mask, first, chain=own
            )
            own = (*own, kv)
            hidden.append(x)
        return hidden, hidden

    # ---- drafting ----------------------------------------------------------------------------

    def draft(self, params, target_params, state: FeatureState, context, key):
        (x,), cache = self.extend(params, target_params, state.cache, state.pending)
        x_BxD = last_rows(x, state.pending.counts_B)
        root_B = context.root_B()
        if self.proposal.sampled:
            tree, cache = self._draft_sampled(params, target_params, cache, x_BxD, root_B, key)
        elif self.top_k == 1:
            tokens_BxD, cache = self._draft_chain(params, target_params, cache, x_BxD)
            tree = self.topology.draft(jnp.concatenate([root_B[:, None], tokens_BxD], axis=1))
        else:
            tree, cache = self._draft_tree(params, target_params, cache, x_BxD, root_B)
        first = functools.partial(self.logits, params, target_params, x_BxD[:, None])
        return self.expecting(params, tree, first), state.replace(cache=cache)

    def _frontier(
        self, params, target_params, cache, x_BxKxD, tokens_BxK, level, offset, visible_BxKxR
    ):
        """Runs K tree nodes of one level: scratch rows from `offset` behind the committed ones."""
        B, K = tokens_BxK.shape
        R = visible_BxKxR.shape[-1]
        positions = jnp.broadcast_to(cache.lengths_B[:, None] + level - 1, (B, K))
        # A square mask over all R scratch rows; this level's K rows of it.
        square = jnp.zeros((B, R, R), bool).at[:, offset : offset + K].set(visible_BxKxR)
        mask = tree_cache_mask(cache.lengths_B, square, cache.slots)[:, offset : offset + K]
        kv = (cache.k[0], cache.v[0])
        start_B = cache.lengths_B + offset
        x, kv = self.step(params, target_params, x_BxKxD, tokens_BxK, positions, mask, kv, start_B)
        return x, cache.replace(k=(kv[0],), v=(kv[1],))

    def _draft_chain(self, params, target_params, cache, x_BxD):
        B, R = x_BxD.shape[0], max(self.depth - 1, 1)
        x, tokens = x_BxD[:, None], []
        for level in range(1, self.depth + 1):
            token_Bx1 = argmax(self.logits(params, target_params, x))
            token_Bx1 = self.to_target_ids(params, token_Bx1)
            tokens.append(token_Bx1)
            if level < self.depth:
                visible = jnp.broadcast_to(jnp.arange(R) < level, (B, 1, R))
                with jax.named_scope(f"step_{level}"):
                    x, cache = self._frontier(
                        params, target_params, cache, x, token_Bx1, level, level - 1, visible
                    )
        return jnp.concatenate(tokens, axis=1), cache

    def _draft_tree(self, params, target_params, cache, x_BxD, root_B):
        """EAGLE-2: expand the K best nodes of each level, then keep the best T - 1 of the pool.

        Scores are cumulative log-probabilities at temperature 1.
        """
        B, D = x_BxD.shape
        K, R = self.top_k, (self.depth - 1) * self.top_k

        def children(x):  # top K of each node: log-probabilities and target ids, B x nodes x K
            logp = jax.nn.log_softmax(self.logits(params, target_params, x))
            logp, ids = jax.lax.top_k(logp, K)
            return logp, self.to_target_ids(params, ids)

        logp, ids = children(x_BxD[:, None])
        score_BxK, token_BxK = logp[:, 0], ids[:, 0]
        frontier_BxK = jnp.broadcast_to(jnp.arange(K), (B, K))  # places in the pool
        scores, tokens = [score_BxK], [token_BxK]
        parents = [jnp.full((B, K), -1)]
        x_BxKxD = jnp.broadcast_to(x_BxD[:, None], (B, K, D))
        visible_BxKxR = jnp.zeros((B, K, R), bool)
        size = K
        for level in range(1, self.depth):
            offset = (level - 1) * K
            own = jnp.arange(R) == offset + jnp.arange(K)[:, None]
            visible_BxKxR = visible_BxKxR | own
            with jax.named_scope(f"level_{level}"):
                x_BxKxD, cache = self._frontier(
                    params, target_params, cache, x_BxKxD, token_BxK, level, offset, visible_BxKxR
                )
                logp, ids = children(x_BxKxD)
            total = (score_BxK[..., None] + logp).reshape(B, K * K)
            ids = ids.reshape(B, K * K)
            scores.append(total)
            tokens.append(ids)
            parents.append(jnp.repeat(frontier_BxK, K, axis=1))
            if level + 1 < self.depth:
                score_BxK, place = jax.lax.top_k(total, K)
                token_BxK = jnp.take_along_axis(ids, place, axis=1)
                frontier_BxK, came_from = size + place, place // K
                x_BxKxD = jnp.take_along_axis(x_BxKxD, came_from[..., None], axis=1)
                visible_BxKxR = jnp.take_along_axis(visible_BxKxR, came_from[..., None], axis=1)
            size += K * K
        score, token, parent = (jnp.concatenate(part, axis=1) for part in (scores, tokens, parents))
        return best_of_pool(root_B, score, token, parent, self.nodes, self.depth, K), cache

    def _draft_sampled(self, params, target_params, cache, x_BxD, root_B, keys_B):
        """Draws the tree level by level, with the law behind every row's children.

        Each node draws its own children where the shape is known (RSD-C, and independent chains);
        else stochastic beam search (RSD-S) draws a level at once.
        """
        B, depth, widths = x_BxD.shape[0], self.depth, self._widths
        R = max(sum(widths[:-1]), 1)

        def laws(x):
            logits = self.logits(params, target_params, x)
            return self.to_target_laws(params, log_law(logits, self.proposal.sampling))

        def draw(keys_B, law_BxMxV, count):
            """`count` children of each of M nodes."""
            kind = self.proposal.kind
            one = lambda k, q: draw_children(k, q, count, kind)  # noqa: E731
            keys_BxM = jax.vmap(lambda k: jax.random.split(k, law_BxMxV.shape[1]))(keys_B)
            return jax.vmap(jax.vmap(one))(keys_BxM, law_BxMxV).reshape(B, -1)

        x, law = x_BxD[:, None], laws(x_BxD[:, None])
        phi, perturbed = jnp.zeros((B, 1)), jnp.zeros((B, 1))
        visible_BxWxR = jnp.zeros((B, 1, R), bool)
        tokens, parents, valid, all_laws = [root_B[:, None]], [], [jnp.ones((B, 1), bool)], [law]
        row, offset = 0, 0  # of the previous level's first node: in the tree, in the cache
        for level, width in enumerate(widths, start=1):
            above = law.shape[1]
            level_keys_B = jax.vmap(lambda k, at=level: jax.random.fold_in(k, at))(keys_B)
            if self._counts:
                token_BxW = draw(level_keys_B, law, width // above)
                from_BxW = jnp.broadcast_to(jnp.arange(width) // (width // above), (B, width))
                valid_BxW = jnp.ones((B, width), bool)
            else:
                grow = functools.partial(beam_step, width=width)
                token_BxW, from_BxW, phi, perturbed = jax.vmap(grow)(
                    level_keys_B, phi, perturbed, law
                )
                valid_BxW = jnp.isfinite(perturbed)
            tokens.append(token_BxW)
            parents.append(row + from_BxW)
            valid.append(valid_BxW)
            row += above
            if level == depth:
                break
            x = jnp.take_along_axis(x, from_BxW[..., None], axis=1)
            own_WxR = jnp.arange(R) == offset + jnp.arange(width)[:, None]
            visible_BxWxR = jnp.take_along_axis(visible_BxWxR, from_BxW[..., None], axis=1)
            visible_BxWxR = visible_BxWxR | own_WxR
            with jax.named_scope(f"level_{level}"):
                x, cache = self._frontier(
                    params, target_params, cache, x, token_BxW, level, offset, visible_BxWxR
                )
                law = laws(x)
            all_laws.append(law)
            offset += width
        all_laws.append(jnp.full((B, widths[-1], law.shape[-1]), -jnp.inf))  # the last: no children
        law_BxTxV = jnp.concatenate(all_laws, axis=1)
        if self._counts:
            return self.topology.draft(jnp.concatenate(tokens, axis=1), law_BxTxV), cache
        token, parent = jnp.concatenate(tokens[1:], axis=1), jnp.concatenate(parents, axis=1)
        tree = tree_of(root_B, token, parent.astype(jnp.int32), depth, widths[-1])
        return tree.replace(valid_T=jnp.concatenate(valid, axis=1), law_TxV=law_BxTxV), cache
