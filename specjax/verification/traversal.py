"""Traversal verification: block verification on trees, from the leaves up.

Source: Weng et al. 2505.12398; no code is public, so the recursion is the project's own
reconstruction, proven by enumeration. Every node v carries r_v (the root's is 1) and the residual
P_v = p_v. Going through its children in draw order,

    r_c = min(1, r_v P_v(x_c)/Q_v(x_c))
    then [r_v P_v - Q_v]+ =: d, Z = sum d,  r_v <- Z/(Z + 1 - r_v),  P_v <- norm(d),  Q_v as drawn,

and nodes are offered in post-order: v is taken with probability r_v as its children left it, the
root for certain; the extra token comes from P_v.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from specjax.sampling import categorical
from specjax.trees import DraftTree, visible_from_parents
from specjax.verification.base import (
    Rule,
    Tree,
    VerifyOut,
    accept_probability,
    capped_ratio,
    capped_share,
    finish,
    normalised,
    over_siblings,
    taken_share,
)


def post_order(draft: DraftTree, depth: int):
    """int32 rank of each valid node: children before parents, siblings in draw order."""
    T, C = draft.child_TxC.shape
    below_TxT = visible_from_parents(draft.parent_T, depth) & draft.valid_T[:, None]
    size_T = jnp.sum(below_TxT, axis=0).astype(jnp.int32)  # valid nodes at and below each

    def enter(pre_T, v):
        def place(rank, carry):
            pre_T, at = carry
            child = draft.child_TxC[v, rank]
            slot = jnp.where(child >= 0, child, T)  # past the end: dropped
            return pre_T.at[slot].set(at, mode="drop"), at + jnp.where(child >= 0, size_T[child], 0)

        return jax.lax.fori_loop(0, C, place, (pre_T, pre_T[v] + 1))[0], None

    pre_T, _ = jax.lax.scan(enter, jnp.zeros(T, jnp.int32), jnp.arange(T))
    return pre_T + size_T - 1 - draft.depth_T


@dataclasses.dataclass(frozen=True)
class Traversal(Rule):
    """Traversal verification; `replacement` says how siblings were drawn."""

    name: ClassVar[str] = "traversal"
    exact: ClassVar[bool] = True

    replacement: bool = False

    @property
    def draws(self) -> str:
        return "with_replacement" if self.replacement else "without_replacement"

    def verify(self, noise, draft, rows, force_T=None) -> VerifyOut:
        depth = noise.depth
        T = draft.tokens_T.shape[0]

        def offer(carry, child, x, Q_V):
            r_T, r, P_V = carry
            r_T = r_T.at[child].set(capped_ratio(r * P_V[x], Q_V[x]))
            left_V = jnp.maximum(r * P_V - Q_V, 0)
            return r_T, capped_share(jnp.sum(left_V), r), normalised(left_V, P_V)

        def descend(r_T, v):
            """Offers the children of v: (r_T with theirs set, r_v and P_v as they leave it)."""
            start = r_T, r_T[v], rows.probs(v)
            return over_siblings(offer, start, draft, v, rows, self.replacement)

        def visit(r_T, v):
            r_T, r, _ = descend(r_T, v)
            return r_T, r

        entered_T = jnp.zeros(T).at[0].set(1.0)
        entered_T, left_T = jax.lax.scan(visit, entered_T, jnp.arange(T))
        taken_T = draft.valid_T & (noise.accept_T < left_T)
        taken_T = taken_T.at[0].set(True)
        node = jnp.argmin(jnp.where(taken_T, post_order(draft, depth), 2 * T)).astype(jnp.int32)
        _, _, P_V = descend(entered_T, node)
        token = categorical(noise.token_A[draft.depth_T[node]], P_V)
        return finish(draft, node, token, depth)

    def law(self, tree: Tree):
        T, V = tree.shape
        stop, following = np.zeros(T), np.zeros((T, V))

        def visit(v, r, mass):
            """Offers the subtree of v to `mass`; returns what it leaves over."""
            P_V = tree.p_TxV[v]
            for c, x, Q_V in tree.siblings(v, self.replacement):
                mass = visit(c, accept_probability(r * P_V[x], Q_V[x]), mass)
                left_V = np.maximum(r * P_V - Q_V, 0)
                Z = left_V.sum()
                r, P_V = taken_share(Z, r), left_V / Z if Z > 0 else P_V
            if v == 0:
                r = 1.0
            stop[v], following[v] = mass * r, P_V
            return mass * (1 - r)

        visit(0, 1.0, 1.0)
        return stop, following
