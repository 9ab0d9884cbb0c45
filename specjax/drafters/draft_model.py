"""A small language model that drafts a chain token by token: two-model speculative sampling.

Source: Leviathan et al. 2211.17192, Chen et al. 2302.01318. Any model of the same vocabulary will
do; without one, a shallow model of the target's family is made and distilled like every drafter.

The cache holds the model's keys and values of committed tokens. A round feeds the last two of them,
then each drafted token but the last: after a draft that was accepted whole its last token has not
been fed yet, and feeding a token again that was writes the same row. Nothing is rolled back, since
slots past the committed length are scratch.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from specjax.cache import KVCache, causal_cache_mask, empty_cache
from specjax.data.tokenizer import load_tokenizer
from specjax.drafters.learned import LearnedDrafter
from specjax.drafters.proposals import KINDS, draw_children, log_law
from specjax.models.config import ModelConfig, read_config
from specjax.models.hf import load_params
from specjax.models.target import resolve_folder
from specjax.models.transformer import forward, head_VxD, init_params
from specjax.sampling import argmax
from specjax.trees import Topology, chain


@dataclasses.dataclass(frozen=True)
class DraftModel(LearnedDrafter):
    """A smaller model of the same vocabulary, drafting a chain."""

    name: ClassVar[str] = "draft_model"
    proposals: ClassVar[tuple[str, ...]] = KINDS  # one child a node: all kinds draw alike

    draft_depth: int = 4
    num_layers: int = 2
    hidden_size: int = 0  # 0 = the target's, here and below
    intermediate_size: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    own_model: ModelConfig | None = None  # geometry of a model that was loaded; overrides the rest

    def __post_init__(self):
        super().__post_init__()
        if self.draft_depth < 1 or self.num_layers < 1:
            raise ValueError("draft_depth, num_layers: must be at least 1")
        if self.draft_vocab_size:
            raise ValueError("draft_vocab_size: a draft model reads out its whole vocabulary")
        if self.model.vocab_size != self.target.vocab_size:
            raise ValueError(
                f"draft model: its vocabulary has {self.model.vocab_size} tokens, the target's "
                f"{self.target.vocab_size}"
            )

    @property
    def model(self) -> ModelConfig:
        """The draft model's geometry."""
        if self.own_model is not None:
            return self.own_model
        t = self.target
        return t.replace(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size or t.hidden_size,
            intermediate_size=self.intermediate_size or t.intermediate_size,
            num_heads=self.num_heads or t.num_heads,
            num_kv_heads=self.num_kv_heads or t.num_kv_heads,
        )

    @property
    def depth(self) -> int:
        return self.draft_depth

    @property
    def nodes(self) -> int:
        return self.depth + 1

    @property
    def topology(self) -> Topology:
        return chain(self.depth)

    @property
    def unrolled(self) -> int:
        return 1  # trained as what it is, a language model

    @classmethod
    def load(cls, target, folder):
        """Any Hugging Face folder of a supported family with the target's vocabulary."""
        folder = resolve_folder(str(folder))
        model = read_config(folder)
        if target.tokenizer is not None and (folder / "tokenizer.json").is_file():
            if load_tokenizer(folder).get_vocab() != target.tokenizer.get_vocab():
                raise ValueError(f"{folder / 'tokenizer.json'}: not the target's vocabulary")
        place = lambda path, array: jnp.asarray(array).astype(target.params["embed"].dtype)  # noqa: E731
        return {"own_model": model}, load_params(folder, model, place)

    def init(self, key, target_params):
        """A fresh model; embedding and head start from the target's where they fit."""
        params = init_params(key, self.model)
        for name in {"embed", "head"} & set(params) & set(target_params):
            if params[name].shape == target_params[name].shape:
                params[name] = target_params[name].astype(jnp.float32)
        return params

    def init_state(self, batch: int, slots: int, dtype) -> KVCache:
        return empty_cache(self.model, batch, slots, dtype)

    def prefill(self, params, target_params, state, committed, context):
        B, P = committed.tokens_BxA.shape
        _, state = self._feed(params, state, context.tokens_BxS[:, :P], jnp.zeros(B, jnp.int32))
        return state

    def _feed(self, params, cache: KVCache, tokens_BxT, start_B):
        """Runs tokens at slots start_B..: (final-normed hidden BxTxD, cache)."""
        T = tokens_BxT.shape[1]
        cache = cache.replace(lengths_B=start_B)
        positions = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
        mask = causal_cache_mask(start_B, T, cache.slots)
        out = forward(params, self.model, tokens_BxT, positions, mask, cache)
        return out.hidden_BxTxD, out.cache

    def draft(self, params, target_params, state, context, key):
        start_B = context.lengths_B - 2  # a prompt and its first new token: never below 0
        last = jax.vmap(lambda row, n: jax.lax.dynamic_slice(row, (n,), (2,)))
        rows = last(context.tokens_BxS, start_B)
        hidden, state = self._feed(params, state, rows, start_B)
        tokens, laws = [context.root_B()[:, None]], []
        for level in range(1, self.depth + 1):
            logits = self.logits(params, target_params, hidden[:, -1:])
            if self.proposal.sampled:
                law_Bx1xV = log_law(logits, self.proposal.sampling)
                keys_B = jax.vmap(lambda k, at=level: jax.random.fold_in(k, at))(key)
                draw = lambda k, q: draw_children(k, q[0], 1, self.proposal.kind)  # noqa: E731
                tokens.append(jax.vmap(draw)(keys_B, law_Bx1xV))
                laws.append(law_Bx1xV)
            else:
                tokens.append(argmax(logits))
            if level < self.depth:
                with jax.named_scope(f"step_{level}"):
                    hidden, state = self._feed(params, state, tokens[-1], start_B + 1 + level)
        law_BxTxV = None
        if laws:  # the deepest row has no children; its law is any
            law_BxTxV = jnp.concatenate([*laws, laws[-1]], axis=1)
        # Committed rows that are final: all but the last two, which the next round feeds again.
        state = state.replace(lengths_B=start_B)
        return self.topology.draft(jnp.concatenate(tokens, axis=1), law_BxTxV), state

    # ---- training ----------------------------------------------------------------------------

    def teach(self, params, target_params, taps_BxTxM, tokens_BxT):
        out = forward(params, self.model, tokens_BxT)
        # Row t reads out after x_{t+1}.
        hidden = jnp.pad(out.hidden_BxTxD[:, 1:], ((0, 0), (0, 1), (0, 0)))
        return [hidden], [hidden]

    def normed(self, params, hidden):
        return hidden  # `forward` ends with the final norm

    def head(self, params, target_params):
        return head_VxD(params)
