"""Recursive rejection sampling on trees (RSD-C, RSD-S, SpecInfer, Sequoia).

Source: Jeon et al. 2402.14160, Chen et al. 2402.12374. Children are tried in the order they were
drawn: child x is accepted with probability min(1, P(x)/Q(x)); a rejection turns P into
norm([P - Q]+) and, when drawn without replacement, strikes x out of Q. What is left of P after the
last rejection is the extra token's law. Where Q runs out, drafting drew uniformly from the tokens
not yet tried, and so does Q here.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from specjax.sampling import categorical
from specjax.verification.base import (
    Rule,
    Tree,
    VerifyOut,
    accept_probability,
    finish,
    normalised,
    over_siblings,
    scan_depth,
)


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
        depth = noise.depth

        def attempt(carry, child, x, Q_V):
            P_V, taken = carry
            accepted = noise.accept_T[child] * Q_V[x] < P_V[x]
            trying = taken < 0
            left_V = normalised(jnp.maximum(P_V - Q_V, 0), P_V)
            P_V = jnp.where(trying & ~accepted, left_V, P_V)
            return P_V, jnp.where(trying & accepted, child, taken)

        def step(carry, d):
            node, P_V, alive = carry
            start = rows.probs(node), jnp.int32(-1)
            left_V, taken = over_siblings(attempt, start, draft, node, rows, self.replacement)
            alive_now = alive & (taken >= 0)
            # The walk stops here: remember what is left of P.
            P_V = jnp.where(alive & (taken < 0), left_V, P_V)
            return jnp.where(alive_now, taken, node), P_V, alive_now

        start = jnp.int32(0), jnp.zeros(rows.logits_TxV.shape[-1]), jnp.bool_(True)
        node, P_V, alive = scan_depth(step, start, depth)
        law_V = jnp.where(alive, rows.probs(node), P_V)  # alive: at the deepest level, no children
        token = categorical(noise.token_A[draft.depth_T[node]], law_V)
        return finish(draft, node, token, depth)

    def law(self, tree: Tree):
        T, V = tree.shape
        stop, following, reach = np.zeros(T), np.zeros((T, V)), np.eye(T)[0]
        for v in range(T):
            P_V, mass = tree.p_TxV[v], reach[v]
            for c, x, Q_V in tree.siblings(v, self.replacement):
                accept = accept_probability(P_V[x], Q_V[x])
                reach[c], mass = mass * accept, mass * (1 - accept)
                left_V = np.maximum(P_V - Q_V, 0)
                P_V = left_V / left_V.sum() if left_V.sum() > 0 else P_V
            stop[v], following[v] = mass, P_V
        return stop, following
