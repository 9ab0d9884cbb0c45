"""Drafters whose depths do not look at each other: one law a depth, all of them read out at once.

Their tree is static. All nodes of one depth share its law, whatever their parents are.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from specjax.drafters.learned import LearnedDrafter
from specjax.drafters.proposals import KINDS, draw_children, log_law
from specjax.models.transformer import head_VxD
from specjax.sampling import top_candidates
from specjax.trees import DraftTree, Topology, backbone, chains


@dataclasses.dataclass(frozen=True)
class ParallelDrafter(LearnedDrafter):
    """Static tree over one law a depth, read out with the target's own head, frozen."""

    proposals: ClassVar[tuple[str, ...]] = KINDS

    @property
    def ranks(self) -> np.ndarray:
        """Of rows 1..: which of its depth's best tokens the row holds, 0 for the very best."""
        return self.topology.rank_T[1:]

    def head(self, params, target_params):
        head = jax.lax.stop_gradient(head_VxD(target_params))
        ids = self.vocab_ids(params)
        return head if ids is None else head[ids]

    def draw_tree(self, params, target_params, hidden_BxNxD, root_B, keys_B) -> DraftTree:
        """The tree below the roots, from the hidden state behind each depth."""
        # One product with the head instead of N.
        logits_BxNxW = self.logits(params, target_params, hidden_BxNxD)
        if self.proposal.sampled:
            drafted_BxM, law_BxTxV = self._sampled(params, logits_BxNxW, keys_B)
        else:
            level_M, rank_M = self.topology.depth_T[1:] - 1, self.ranks
            _, best_BxNxC = top_candidates(logits_BxNxW, int(rank_M.max()) + 1)
            drafted_BxM, law_BxTxV = best_BxNxC[:, level_M, rank_M], None
            drafted_BxM = self.to_target_ids(params, drafted_BxM)
        tokens_BxT = jnp.concatenate([root_B[:, None], drafted_BxM], axis=1)
        tree = self.topology.draft(tokens_BxT, law_BxTxV)
        return self.expecting(params, tree, lambda: logits_BxNxW[:, :1])

    def _sampled(self, params, logits_BxNxW, keys_B):
        """Tokens of rows 1.. and the law behind every row's children.

        Every node draws its own children: rules that look into two subtrees need them independent.
        Without replacement that is one draw for the children of each node; with it all nodes of a
        depth are independent, so one draw for each depth.
        """
        kind, topology, N = self.proposal.kind, self.topology, self.depth
        law_BxNxV = self.to_target_laws(params, log_law(logits_BxNxW, self.proposal.sampling))
        together = topology.parents if kind == "without_replacement" else topology.depth_T
        groups = {}
        for row in range(1, topology.nodes):
            groups.setdefault(together[row], []).append(row)
        groups = list(groups.values())
        count = max(map(len, groups))
        level_G = np.array([topology.depth_T[rows[0]] - 1 for rows in groups])
        place = {row: (g, j) for g, rows in enumerate(groups) for j, row in enumerate(rows)}
        group_M, place_M = np.array([place[row] for row in range(1, topology.nodes)]).T

        def draw(key, logq_NxV):
            keys_G = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(groups)))
            one = lambda k, logq: draw_children(k, logq, count, kind)  # noqa: E731
            return jax.vmap(one)(keys_G, logq_NxV[level_G])

        drawn_BxGxC = jax.vmap(draw)(keys_B, law_BxNxV)
        # The deepest rows have no children; theirs is any law.
        return drawn_BxGxC[:, group_M, place_M], law_BxNxV[:, topology.depth_T.clip(max=N - 1)]


@dataclasses.dataclass(frozen=True)
class BackboneDrafter(ParallelDrafter):
    """On FastEagle's backbone-expansion tree, or on as many chains where a rule asks for chains."""

    candidates: int = 1  # C: tokens per level

    def __post_init__(self):
        super().__post_init__()
        if self.candidates < 1:
            raise ValueError(f"candidates: {self.candidates} must be at least 1")

    @property
    def topology(self) -> Topology | None:
        if self.proposal.kind == "chains":
            return chains(self.candidates, self.depth)
        return backbone(self.depth, self.candidates)
