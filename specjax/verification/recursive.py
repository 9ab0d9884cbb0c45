"""Recursive rejection sampling on trees (RSD-C, RSD-S, SpecInfer, Sequoia).

Source: Jeon et al. 2402.14160, Chen et al. 2402.12374. Children are tried in the order they were
drawn: child x is accepted with probability min(1, P(x)/Q(x)); a rejection turns P into
norm([P - Q]+) and, when drawn without replacement, strikes x out of Q. What is left of P after the
last rejection is the extra token's law. Where Q runs out, drafting drew uniformly from the tokens
not yet tried, and so does Q here.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from specjax.sampling import categorical
from specjax.verification.base import (
    Rule,
    Tree,
    VerifyOut,
    child_at,
    child_law,
    finish,
    normalised,
    scan_depth,
)
from specjax.verification.token import accept_probability


def strike_out(Q_V, tried_V, token):
    """(Q, tried) after drawing `token` without replacement; uniform over the rest when Q is out."""
    tried_V = tried_V | (jnp.arange(Q_V.shape[0]) == token)
    uniform_V = normalised((~tried_V).astype(Q_V.dtype), Q_V)
    return normalised(jnp.where(tried_V, 0.0, Q_V), uniform_V), tried_V


def struck_out(Q_V, tried, token):
    """`strike_out` in NumPy; `tried` is a list that is added to."""
    tried.append(token)
    Q_V[tried] = 0
    if Q_V.sum() == 0:
        Q_V = np.ones(len(Q_V))
        Q_V[tried] = 0
    return Q_V / Q_V.sum() if Q_V.sum() > 0 else Q_V


@dataclasses.dataclass(frozen=True)
class RecursiveRejection(Rule):
    """Recursive rejection; `replacement` says how siblings were drawn."""

    name: ClassVar[str] = "recursive_rejection"
    exact: ClassVar[bool] = True

    replacement: bool = False

    @property
    def draws(self) -> str:
        return "with_replacement" if self.replacement else "without_replacement"

    def verify(self, noise, draft, rows, force_T=None) -> VerifyOut:
        depth, C = noise.token_A.shape[0] - 1, draft.child_TxC.shape[1]
        sampled = draft.law_TxV is not None

        def try_children(node):
            """(accepted child or -1, what is left of P) at `node`."""
            P_V = rows.probs(node)
            Q_V = jnp.exp(draft.law_TxV[node]) if sampled else jnp.zeros_like(P_V)

            def attempt(rank, carry):
                P_V, Q_V, tried_V, taken = carry
                child, there = child_at(draft, node, rank)
                x = draft.tokens_T[child]
                Q = Q_V if sampled else child_law(draft, node, child, rows)
                accepted = noise.accept_T[child] * Q[x] < P_V[x]
                live = there & (taken < 0)
                taken = jnp.where(live & accepted, child, taken)
                live &= ~accepted
                P_V = jnp.where(live, normalised(jnp.maximum(P_V - Q, 0), P_V), P_V)
                if sampled and not self.replacement:
                    Q_new, tried_new = strike_out(Q_V, tried_V, x)
                    Q_V, tried_V = jnp.where(live, Q_new, Q_V), jnp.where(live, tried_new, tried_V)
                return P_V, Q_V, tried_V, taken

            start = P_V, Q_V, jnp.zeros(P_V.shape, bool), jnp.int32(-1)
            P_V, _, _, taken = jax.lax.fori_loop(0, C, attempt, start, unroll=C <= 4)
            return taken, P_V

        def step(carry, d):
            node, P_V, alive = carry
            taken, left_V = try_children(node)
            alive_now = alive & (taken >= 0)
            # The walk stops here: remember what is left of P.
            P_V = jnp.where(alive & (taken < 0), left_V, P_V)
            return jnp.where(alive_now, taken, node), P_V, alive_now

        P_V = jnp.zeros_like(rows.probs(0))
        start = jnp.int32(0), P_V, jnp.bool_(True)
        node, P_V, alive = scan_depth(step, start, depth)
        law_V = jnp.where(alive, rows.probs(node), P_V)  # alive: at the deepest level, no children
        token = categorical(noise.token_A[draft.depth_T[node]], law_V)
        return finish(draft, node, token, depth)

    def law(self, tree: Tree):
        T, V = tree.shape
        stop, following, reach = np.zeros(T), np.zeros((T, V)), np.eye(T)[0]
        for v in range(T):
            P_V, mass, Q_V, tried = tree.p_TxV[v].copy(), reach[v], None, []
            for c in tree.children[v]:
                x = tree.tokens[c]
                if Q_V is None or tree.q_TxV is None:
                    Q_V = tree.drawn_from(v, c)
                accept = accept_probability(P_V[x], Q_V[x])
                reach[c], mass = mass * accept, mass * (1 - accept)
                left = np.maximum(P_V - Q_V, 0)
                P_V = left / left.sum() if left.sum() > 0 else P_V
                if tree.q_TxV is not None and not self.replacement:
                    Q_V = struck_out(Q_V, tried, x)
            stop[v], following[v] = mass, P_V
        return stop, following
