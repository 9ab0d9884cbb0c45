"""A small language model that drafts a chain token by token: two-model speculative sampling.

Source: Leviathan et al. 2211.17192, Chen et al. 2302.01318. Any model of the same vocabulary will
do; without one, a shallow model of the target's family is made and distilled like every drafter.
"""

import dataclasses
import functools
import warnings
from typing import ClassVar

import jax.numpy as jnp

from specjax.cache import KVCache, empty_cache
from specjax.data.tokenizer import load_tokenizer
from specjax.drafters.chain import ChainDrafter
from specjax.drafters.stopping import neutral_head
from specjax.models.config import ModelConfig, read_config
from specjax.models.hf import load_params
from specjax.models.target import resolve_folder
from specjax.models.transformer import forward, head_VxD, init_params
from specjax.sharding import leaf_sharding


@dataclasses.dataclass(frozen=True)
class DraftModel(ChainDrafter):
    """A smaller model of the same vocabulary, drafting a chain."""

    name: ClassVar[str] = "draft_model"

    num_layers: int = 2
    hidden_size: int = 0  # 0 = the target's, here and below
    intermediate_size: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    own_model: ModelConfig | None = None  # geometry of a model that was loaded; overrides the rest

    def __post_init__(self):
        super().__post_init__()
        if self.num_layers < 1:
            raise ValueError(f"num_layers: {self.num_layers} must be at least 1")
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

    @classmethod
    def load(cls, target, folder):
        """Any Hugging Face folder of a supported family with the target's vocabulary."""
        folder = resolve_folder(str(folder))
        model = read_config(folder)
        path = folder / "tokenizer.json"
        if target.tokenizer is not None and not path.is_file():
            warnings.warn(
                f"{path}: missing; that both models give their {model.vocab_size} tokens the same "
                "ids is not checked",
                stacklevel=3,
            )
        elif target.tokenizer is not None:
            if load_tokenizer(folder).get_vocab() != target.tokenizer.get_vocab():
                raise ValueError(f"{path}: not the target's vocabulary")
        at = None if target.mesh is None else functools.partial(leaf_sharding, target.mesh)
        params = load_params(folder, model, target.params["embed"].dtype, at)
        return {"own_model": model}, params

    def init(self, key, target_params):
        """A fresh model; embedding and head start from the target's where they fit."""
        params = init_params(key, self.model)
        for name in {"embed", "head"} & set(params) & set(target_params):
            if params[name].shape == target_params[name].shape:
                params[name] = target_params[name].astype(jnp.float32)
        if self.stop == "specdec":  # fitted after the model: `training.acceptance.fit_acceptance`
            params["buffers"] = {"acceptance": neutral_head(self.model.hidden_size)}
        return params

    def init_state(self, batch: int, slots: int, dtype) -> KVCache:
        return empty_cache(self.model, batch, slots, dtype)

    def states(self, params, target_params, tokens_BxT, positions_BxT, mask, cache=None):
        out = forward(params, self.model, tokens_BxT, positions_BxT, mask, cache)
        return out.hidden_BxTxD, out.cache

    def normed(self, params, hidden):
        return hidden  # `forward` ends with the final norm

    def head(self, params, target_params):
        return head_VxD(params)
