"""Token-level speculative sampling on a chain: accept x with probability min(1, p(x)/q(x)).

Source: Leviathan et al. 2211.17192, Chen et al. 2302.01318. The first rejected token is replaced
by a draw from the residual norm([p - q]+); after the last accepted one the target draws freely.
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
    child_at,
    child_law,
    finish,
    normalised,
    scan_depth,
)


@dataclasses.dataclass(frozen=True)
class Token(Rule):
    """Token-level speculative sampling."""

    name: ClassVar[str] = "token"
    exact: ClassVar[bool] = True
    forces: ClassVar[bool] = True
    chain_only: ClassVar[bool] = True
    lenience: ClassVar[float] = 1.0  # scales q; below 1 the rule is `lenient`

    @property
    def draws(self) -> str:
        return "without_replacement"

    def verify(self, noise, draft, rows, force_T=None) -> VerifyOut:
        depth = noise.depth

        def step(carry, d):
            node, alive = carry
            child, there = child_at(draft, node, 0)
            x, p_V = draft.tokens_T[child], rows.probs(node)
            q_V = self.lenience * child_law(draft, node, child, rows)
            # Multiplied out: no division, p = 0 always rejects, q = 0 < p accepts.
            accepted = noise.accept_T[child] * q_V[x] < p_V[x]
            if force_T is not None:
                accepted |= force_T[child]
            alive &= there & accepted
            return jnp.where(alive, child, node), alive

        node, _ = scan_depth(step, (jnp.int32(0), jnp.bool_(True)), depth)
        child, there = child_at(draft, node, 0)
        p_V = rows.probs(node)
        residual_V = jnp.maximum(p_V - self.lenience * child_law(draft, node, child, rows), 0)
        law_V = jnp.where(there, normalised(residual_V, p_V), p_V)
        token = categorical(noise.token_A[draft.depth_T[node]], law_V)
        return finish(draft, node, token, depth)

    def law(self, tree: Tree):
        T, V = tree.shape
        stop, following = np.zeros(T), np.zeros((T, V))
        node, mass = 0, 1.0
        while tree.children[node]:
            ((child, x, q_V),) = tree.siblings(node)
            p_V, q_V = tree.p_TxV[node], self.lenience * q_V
            accept = 1.0 if tree.force_T[child] else accept_probability(p_V[x], q_V[x])
            residual_V = np.maximum(p_V - q_V, 0)
            left = residual_V.sum()
            following[node] = residual_V / left if left > 0 else p_V
            stop[node] = mass * (1 - accept)
            node, mass = child, mass * accept
        stop[node], following[node] = mass, tree.p_TxV[node]
        return stop, following
