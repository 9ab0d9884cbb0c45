"""What drafters share that read their own tokens: a chain, drafted token by token.

The cache holds the drafting model's keys and values of committed tokens. A round feeds the last
`catch_up` of them, then each drafted token but the last. Two are enough for its own drafts: after
one that was accepted whole its last token has not been fed yet, and feeding a token again that was
writes the same row. Where others draft beside it, as many as a round may commit are fed. Nothing is
rolled back, since slots past the committed length are scratch.

Adaptive length (`stop`): a row whose policy says stop drafts no further, its later tree rows are
invalid, and drafting ends when every row of the batch has stopped.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from specjax.cache import KVCache, causal_cache_mask
from specjax.drafters.learned import LearnedDrafter
from specjax.drafters.proposals import KINDS, draw_children, log_law
from specjax.drafters.stopping import POLICIES, acceptance_logit
from specjax.models.transformer import text_layout
from specjax.sampling import argmax
from specjax.trees import Topology, chain


@flax.struct.dataclass
class _Chain:
    """A draft in the making."""

    cache: KVCache
    hidden_BxD: jax.Array  # after the newest token fed
    tokens_BxT: jax.Array
    valid_BxT: jax.Array
    alive_B: jax.Array  # whether the row drafts on
    survive_B: jax.Array  # predicted probability that nothing fed so far is rejected
    law_BxTxV: Any


@dataclasses.dataclass(frozen=True)
class ChainDrafter(LearnedDrafter):
    """A causal model of the text alone, drafting a chain; `init_state` is its empty KVCache."""

    proposals: ClassVar[tuple[str, ...]] = KINDS  # one child a node: all kinds draw alike
    policies: ClassVar[tuple[str, ...]] = POLICIES  # what `stop` may be

    draft_depth: int = 4
    stop: str = "fixed"
    # "confidence": stop after a token less probable than this; "specdec": when a rejection is more
    # probable than this
    threshold: float = 0.3
    min_depth: int = 1  # tokens drafted whatever the policy says
    catch_up: int = 2  # newest committed tokens that a round feeds

    def __post_init__(self):
        super().__post_init__()
        if self.draft_depth < 1:
            raise ValueError(f"draft_depth: {self.draft_depth} must be at least 1")
        if self.stop not in self.policies:
            raise ValueError(f"stop: {self.stop!r} is unknown; one of {self.policies}")
        if not 1 <= self.min_depth <= self.draft_depth:
            raise ValueError(
                f"min_depth: {self.min_depth} must be in [1, draft_depth={self.draft_depth}]"
            )
        if self.catch_up < 2:
            raise ValueError(f"catch_up: {self.catch_up} must be at least 2")
        if self.draft_vocab_size:
            raise ValueError(f"draft_vocab_size: {self.name} reads out its whole vocabulary")

    def states(self, params, target_params, tokens_BxT, positions_BxT, mask, cache=None):
        """The drafting model over tokens: (states that `logits` reads out BxTxD, cache).

        With a cache, rows are written at slots lengths.. and the mask is BxTxS, as in
        `transformer.forward`; without one the text is read whole.
        """
        raise NotImplementedError

    @property
    def depth(self) -> int:
        return self.draft_depth

    @property
    def topology(self) -> Topology:
        return chain(self.depth)

    @property
    def unrolled(self) -> int:
        return 1  # trained as what it is, a language model

    def among_others(self, depth: int) -> "ChainDrafter":
        return dataclasses.replace(self, catch_up=max(2, depth + 1))

    # ---- drafting --------------------------------------------------------------------------------

    def prefill(self, params, target_params, state, committed, context):
        begin_B = context.begin_B(committed)
        rows_BxP = context.rows_BxA(begin_B, committed.tokens_BxA.shape[1])
        _, state = self._feed(params, target_params, state, rows_BxP, begin_B)
        return state.replace(lengths_B=self._final_B(context))

    def _final_B(self, context):
        """Committed rows that are final: all but those which the next round may feed again."""
        return jnp.maximum(context.lengths_B - self.catch_up, 0)

    def _feed(self, params, target_params, cache: KVCache, tokens_BxT, start_B):
        """Runs tokens at slots start_B..: (states BxTxD, cache)."""
        T = tokens_BxT.shape[1]
        cache = cache.replace(lengths_B=start_B)
        positions = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
        mask = causal_cache_mask(start_B, T, cache.slots)
        return self.states(params, target_params, tokens_BxT, positions, mask, cache)

    def draft(self, params, target_params, state, context, key):
        B, T, W = context.lengths_B.shape[0], self.nodes, self.catch_up
        root_at_B = context.lengths_B - 1
        start_B = self._final_B(context)  # in a short text, rows past the root are junk
        tokens_BxW = context.rows_BxA(start_B, W)
        hidden, cache = self._feed(params, target_params, state, tokens_BxW, start_B)
        place_Bx1x1 = (root_at_B - start_B)[:, None, None]
        law_BxTxV = None
        if self.proposal.sampled:  # the deepest row has no children; its law is any
            law_BxTxV = jnp.full((B, T, self.target.vocab_size), -jnp.inf)
        root = jnp.arange(T) == 0
        draft = _Chain(
            cache,
            jnp.take_along_axis(hidden, place_Bx1x1, axis=1)[:, 0],
            jnp.where(root, context.root_B()[:, None], 0),
            jnp.broadcast_to(root, (B, T)),
            jnp.ones(B, bool),
            jnp.ones(B),
            law_BxTxV,
        )
        first = functools.partial(self.logits, params, target_params, draft.hidden_BxD[:, None])
        draft = self._draw(params, target_params, draft, 1, key)

        def step(level, draft):
            token_Bx1 = jax.lax.dynamic_slice_in_dim(draft.tokens_BxT, level, 1, axis=1)
            with jax.named_scope("step"):
                hidden, cache = self._feed(
                    params, target_params, draft.cache, token_Bx1, root_at_B + level
                )
            draft = draft.replace(hidden_BxD=hidden[:, 0], cache=cache)
            return self._draw(params, target_params, draft, level + 1, key)

        if self.stop == "fixed":
            for level in range(1, self.depth):
                draft = step(level, draft)
        else:
            _, draft = jax.lax.while_loop(
                lambda carry: (carry[0] < self.depth) & jnp.any(carry[1].alive_B),
                lambda carry: (carry[0] + 1, step(*carry)),
                (jnp.int32(1), draft),
            )
        tree = self.topology.draft(draft.tokens_BxT, draft.law_BxTxV)
        tree = self.expecting(params, tree.replace(valid_T=draft.valid_BxT), first)
        return tree, draft.cache.replace(lengths_B=start_B)

    def _draw(self, params, target_params, draft: _Chain, level, keys_B) -> _Chain:
        """Draws token `level` where the row is alive, and decides where it drafts on."""
        logits_BxV = self.logits(params, target_params, draft.hidden_BxD[:, None])[:, 0]
        law_BxTxV = draft.law_BxTxV
        if self.proposal.sampled:
            law_BxV = log_law(logits_BxV, self.proposal.sampling)
            draw = lambda k, q: draw_children(  # noqa: E731
                jax.random.fold_in(k, level), q, 1, self.proposal.kind
            )[0]
            token_B = jax.vmap(draw)(keys_B, law_BxV)
            law_BxTxV = law_BxTxV.at[:, level - 1].set(law_BxV)
        else:
            token_B = argmax(logits_BxV)
        alive_B, survive_B = draft.alive_B, draft.survive_B
        if self.stop == "confidence":
            own_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=1)[:, 0]
            logp_B = own_B - jax.nn.logsumexp(logits_BxV, axis=-1)
            alive_B &= (jnp.exp(logp_B) >= self.threshold) | (level < self.min_depth)
        if self.stop == "specdec":
            # The state has read token level - 1 (the root at level 1, which is never in doubt).
            head = params.get("buffers", {}).get("acceptance")
            if head is None:
                raise ValueError(
                    f"stop: 'specdec' needs an acceptance head, which this {self.name} was made "
                    "without; specjax.training.acceptance.fit_acceptance gives it one"
                )
            accept_B = jax.nn.sigmoid(acceptance_logit(head, draft.hidden_BxD))
            survive_B = jnp.where(level > 1, survive_B * accept_B, survive_B)
            alive_B &= (1 - survive_B <= self.threshold) | (level < self.min_depth)
        return draft.replace(
            tokens_BxT=draft.tokens_BxT.at[:, level].set(token_B),
            valid_BxT=draft.valid_BxT.at[:, level].set(draft.alive_B),
            alive_B=alive_B,
            survive_B=survive_B,
            law_BxTxV=law_BxTxV,
        )

    # ---- training --------------------------------------------------------------------------------

    def teach(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        layout = text_layout(tokens_BxT, segments_BxT)
        hidden, _ = self.states(params, target_params, tokens_BxT, *layout)
        hidden = jnp.pad(hidden[:, 1:], ((0, 0), (0, 1), (0, 0)))  # row t reads out after x_{t+1}
        return [hidden], [hidden]
