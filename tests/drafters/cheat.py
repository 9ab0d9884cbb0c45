"""A test-only drafter that knows the answer: every acceptance length and leaf can be made to occur.

Its parameters are tables of what to propose. In every round it draws up any tree so that exactly
one walk, from the root to a chosen row, carries the true tokens; all other rows are wrong.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from specjax.drafters.base import Drafter
from specjax.trained import TrainedDrafter
from specjax.trees import DraftTree, Topology, children_from_parents, visible_from_parents


@dataclasses.dataclass(frozen=True)
class Cheat(Drafter):
    """`shape` is a static tree; without one, trees of `size` rows come from the parameters.

    Parameters, by the number n of committed tokens (each table may have one row for all requests):
      truth: BxS tokens, truth[b, p] is right at position p.
      goal: BxS rows of the tree; row goal[b, n] ends the true walk.
      parents, valid: RxT, used when there is no static shape; row n % R is this round's tree.
    """

    name: ClassVar[str] = "cheat"

    shape: Topology | None = None
    size: int = 0
    levels: int = 0

    @property
    def nodes(self) -> int:
        return self.shape.nodes if self.shape else self.size

    @property
    def depth(self) -> int:
        return self.shape.max_depth if self.shape else self.levels

    @property
    def topology(self):
        return self.shape

    def draft(self, params, target_params, state, context, key):
        B, n_B = context.lengths_B.shape[0], context.lengths_B
        if self.shape is None:
            pick_B = n_B % params["parents"].shape[0]
            parent_BxT, valid_BxT = params["parents"][pick_B], params["valid"][pick_B]
        else:
            parent_BxT = jnp.broadcast_to(np.array(self.shape.parents, np.int32), (B, self.nodes))
            valid_BxT = jnp.ones((B, self.nodes), bool)
        truth_BxS = jnp.broadcast_to(params["truth"], (B, params["truth"].shape[-1]))
        goal_BxS = jnp.broadcast_to(params["goal"], (B, params["goal"].shape[-1]))

        def one(parent_T, valid_T, truth_S, goal_S, root, n):
            visible_TxT = visible_from_parents(parent_T, self.depth)
            depth_T = jnp.sum(visible_TxT, axis=1).astype(jnp.int32) - 1
            right_T = visible_TxT[goal_S[n]]
            true_T = truth_S[jnp.minimum(n - 1 + depth_T, truth_S.shape[0] - 1)]
            # Wrong tokens: distinct among siblings, and never the true one.
            siblings_TxT = (parent_T[:, None] == parent_T) & jnp.tri(self.nodes, k=-1, dtype=bool)
            wrong_T = (true_T + 1 + jnp.sum(siblings_TxT, axis=1)) % self.target.vocab_size
            # Rows switched off carry the truth: a bait that must not be taken.
            tokens_T = jnp.where(right_T | ~valid_T, true_T, wrong_T).at[0].set(root)
            child_TxC = children_from_parents(parent_T, self.nodes)
            return DraftTree(tokens_T.astype(jnp.int32), parent_T, child_TxC, depth_T, valid_T)

        args = parent_BxT, valid_BxT, truth_BxS, goal_BxS, context.root_B(), n_B
        return jax.vmap(one)(*args), state


def make_cheat(target, shape=None, parents=None, valid=None, *, truth, goal) -> TrainedDrafter:
    """A Cheat ready for `generate`; see the class for the tables."""
    params = {"truth": jnp.asarray(truth, jnp.int32), "goal": jnp.asarray(goal, jnp.int32)}
    if shape is not None:
        return TrainedDrafter(Cheat(target.config, shape), params, target.fingerprint)
    parents = np.asarray(parents, np.int32)
    depth = max(Topology(tuple(row)).max_depth for row in parents.tolist())
    params |= {"parents": jnp.asarray(parents), "valid": jnp.asarray(valid, bool)}
    definition = Cheat(target.config, None, parents.shape[1], depth)
    return TrainedDrafter(definition, params, target.fingerprint)
