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
    child_at,
    child_law,
    finish,
    normalised,
)
from specjax.verification.recursive import strike_out, struck_out


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
        depth = noise.token_A.shape[0] - 1
        T, C = draft.child_TxC.shape
        sampled = draft.law_TxV is not None

        def descend(r_T, v):
            """Offers the children of v: (r_T with theirs set, r_v and P_v as they leave it)."""
            P_V = rows.probs(v)
            Q_V = jnp.exp(draft.law_TxV[v]) if sampled else jnp.zeros_like(P_V)

            def offer(rank, carry):
                r_T, r, P_V, Q_V, tried_V = carry
                child, there = child_at(draft, v, rank)
                x = draft.tokens_T[child]
                Q = Q_V if sampled else child_law(draft, v, child, rows)
                ratio = r * P_V[x] / jnp.where(Q[x] > 0, Q[x], 1.0)
                ratio = jnp.where(Q[x] > 0, ratio, (r * P_V[x] > 0).astype(ratio.dtype))
                slot = jnp.where(there, child, T)
                r_T = r_T.at[slot].set(jnp.minimum(ratio, 1.0), mode="drop")
                left_V = jnp.maximum(r * P_V - Q, 0)
                Z = jnp.sum(left_V)
                taken = jnp.where(Z + (1 - r) > 0, Z / jnp.maximum(Z + (1 - r), 1e-38), 1.0)
                r = jnp.where(there, taken, r)
                P_V = jnp.where(there, normalised(left_V, P_V), P_V)
                if sampled and not self.replacement:
                    Q_new, tried_new = strike_out(Q_V, tried_V, x)
                    Q_V = jnp.where(there, Q_new, Q_V)
                    tried_V = jnp.where(there, tried_new, tried_V)
                return r_T, r, P_V, Q_V, tried_V

            start = r_T, r_T[v], P_V, Q_V, jnp.zeros(P_V.shape, bool)
            r_T, r, P_V, _, _ = jax.lax.fori_loop(0, C, offer, start)
            return r_T, r, P_V

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
            P_V, Q_V, tried = tree.p_TxV[v].copy(), None, []
            for c in tree.children[v]:
                x = tree.tokens[c]
                if Q_V is None or tree.q_TxV is None:
                    Q_V = tree.drawn_from(v, c)
                ratio = r * P_V[x] / Q_V[x] if Q_V[x] > 0 else float(r * P_V[x] > 0)
                mass = visit(c, min(1.0, ratio), mass)
                left = np.maximum(r * P_V - Q_V, 0)
                Z = left.sum()
                r = Z / (Z + (1 - r)) if Z + (1 - r) > 0 else 1.0
                P_V = left / Z if Z > 0 else P_V
                if tree.q_TxV is not None and not self.replacement:
                    Q_V = struck_out(Q_V, tried, x)
            if v == 0:
                r = 1.0
            stop[v], following[v] = mass * r, P_V
            return mass * (1 - r)

        visit(0, 1.0, 1.0)
        return stop, following
