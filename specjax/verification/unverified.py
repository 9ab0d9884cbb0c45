"""No verification: the first child at every node, whatever the target says. Lossy.

What it emits is the drafter's own text, but for the target's one token at the end of each round:
on-policy training data (DistillSpec, arXiv 2310.08461), and the most that any rule could accept.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from specjax.verification.base import Rule, Tree, VerifyOut, child_at, finish, scan_depth


@dataclasses.dataclass(frozen=True)
class Unverified(Rule):
    """Accepts the whole first path; `draw` is how the drafter draws it."""

    name: ClassVar[str] = "unverified"
    exact: ClassVar[bool] = False

    draw: str = "top"

    @property
    def draws(self) -> str:
        return self.draw

    def verify(self, noise, draft, rows, force_T=None) -> VerifyOut:
        depth = noise.depth

        def step(node, d):
            child, there = child_at(draft, node, 0)
            return jnp.where(there, child, node)

        node = scan_depth(step, jnp.int32(0), depth) if depth else jnp.int32(0)
        return finish(draft, node, rows.token(node, noise.token_A[draft.depth_T[node]]), depth)

    def law(self, tree: Tree):
        stop, following, v = np.zeros(tree.shape[0]), np.zeros(tree.shape), 0
        while tree.children[v]:
            v = tree.children[v][0]
        stop[v], following[v] = 1.0, tree.p_TxV[v]
        return stop, following
