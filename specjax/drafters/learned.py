"""What every drafter with parameters to train shows to the objective."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from specjax.drafters.base import Drafter
from specjax.models.linear import readout
from specjax.sampling import top_candidates
from specjax.trees import DraftTree


@dataclasses.dataclass(frozen=True)
class LearnedDrafter(Drafter):
    """A drafter whose depths read out hidden states; trained by `training.objective`."""

    trained = True

    draft_vocab_size: int = 0  # 0 = the whole vocabulary

    def __post_init__(self):
        if not 0 <= self.draft_vocab_size <= self.target.vocab_size:
            raise ValueError(
                f"draft_vocab_size: {self.draft_vocab_size} must be in "
                f"[0, {self.target.vocab_size}] (0 is the whole vocabulary)"
            )

    @property
    def unrolled(self) -> int:
        """Depths that `teach` trains."""
        return self.depth

    def teach(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        """Teacher-forced forward over a text: (hidden, features), lists of `unrolled` states BxTxD.

        Row t stands for the round whose root is x_{t+1}; entry i-1 (layer or step i) drafts
        x_{t+1+i} there and its teacher is the target at position t+i. `hidden` is read out;
        `features` is what a feature loss aligns (the same states, unless a layer keeps them apart).

        Args:
          taps_BxTxM: the target's tapped features, None where `taps` is empty.
          tokens_BxT: the text, x_t in row t.
          segments_BxT: where a row holds several texts, whose each token is: `text_layout` has the
            positions and the mask that keep them apart. States whose label is another text's may
            be anything.
        """
        raise NotImplementedError

    def normed(self, params, hidden):
        """The readout norm."""
        raise NotImplementedError

    def head(self, params, target_params):
        """Rows of the readout matrix, [W, D]."""
        raise NotImplementedError

    def logits(self, params, target_params, hidden_BxTxD):
        """Draft logits over the draft vocabulary, BxTxW float32."""
        return readout(self.normed(params, hidden_BxTxD), self.head(params, target_params))

    def expecting(self, params, tree: DraftTree, first: Callable) -> DraftTree:
        """The tree with the best tokens of its first depth's law beside it, if asked for.

        Args:
          first: () -> logits_Bx1xW of that depth.
        """
        if not self.expected:
            return tree
        logits_BxW = first()[:, 0]
        _, best_BxK = top_candidates(logits_BxW, min(self.expected, logits_BxW.shape[-1]))
        return tree.replace(expected_K=self.to_target_ids(params, best_BxK))

    # ---- the draft vocabulary ----------------------------------------------------------------

    def vocab_ids(self, params):
        """int32[W] target ids of the draft vocabulary, or None for the whole vocabulary."""
        return params["buffers"]["vocab_ids"] if self.draft_vocab_size else None

    def to_target_ids(self, params, draft_ids):
        """Draft vocabulary ids -> target ids."""
        ids = self.vocab_ids(params)
        return draft_ids if ids is None else ids[draft_ids]

    def to_target_laws(self, params, logq):
        """Log-laws over the draft vocabulary -> over the whole one (last axis)."""
        ids = self.vocab_ids(params)
        if ids is None:
            return logq
        empty = jnp.full((*logq.shape[:-1], self.target.vocab_size), -jnp.inf)
        return empty.at[..., ids].set(logq)
