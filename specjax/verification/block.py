"""Block verification of a chain: accept a whole prefix by its joint ratio.

Source: Sun et al. 2403.10444 (ICLR 2025). With P_i = min(P_{i-1} p_i(x_i)/q_i(x_i), 1), prefix i
is taken with probability h_i = Z_i/(Z_i + 1 - P_i), Z_i = sum [P_i p_{i+1} - q_{i+1}]+, the whole
block with P_n; the longest prefix taken wins, whatever failed before it. The residual is
norm([P_i p_{i+1} - q_{i+1}]+). Never accepts less than the token rule in expectation.
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
    capped_ratio,
    capped_share,
    child_at,
    child_law,
    finish,
    normalised,
    scan_depth,
    taken_share,
)


@dataclasses.dataclass(frozen=True)
class Block(Rule):
    """Block verification."""

    name: ClassVar[str] = "block"
    exact: ClassVar[bool] = True
    chain_only: ClassVar[bool] = True

    @property
    def draws(self) -> str:
        return "without_replacement"

    def verify(self, noise, draft, rows, force_T=None) -> VerifyOut:
        depth = noise.depth

        def look(node, ratio):
            """(child, whether it is there, p, q of the child, [ratio p - q]+) at `node`."""
            child, there = child_at(draft, node, 0)
            p_V, q_V = rows.probs(node), child_law(draft, node, child, rows)
            return child, there, p_V, q_V, jnp.maximum(ratio * p_V - q_V, 0)

        def step(carry, d):
            node, ratio, best, best_ratio, alive = carry
            child, there, p_V, q_V, rest_V = look(node, ratio)
            taken = jnp.where(there, capped_share(jnp.sum(rest_V), ratio), ratio)
            win = alive & (noise.accept_T[node] < taken)
            best, best_ratio = jnp.where(win, node, best), jnp.where(win, ratio, best_ratio)
            alive, x = alive & there, draft.tokens_T[child]
            below = capped_ratio(ratio * p_V[x], q_V[x])
            return jnp.where(alive, child, node), below, best, best_ratio, alive

        # The root's ratio is 1, so that it is always taken.
        start = jnp.int32(0), jnp.float32(1), jnp.int32(0), jnp.float32(1), jnp.bool_(True)
        _, _, node, ratio, _ = scan_depth(step, start, depth + 1)
        _, there, p_V, _, rest_V = look(node, ratio)
        law_V = jnp.where(there, normalised(rest_V, p_V), p_V)
        token = categorical(noise.token_A[draft.depth_T[node]], law_V)
        return finish(draft, node, token, depth)

    def law(self, tree: Tree):
        T, V = tree.shape
        stop, following = np.zeros(T), np.zeros((T, V))
        taken, node, ratio = {}, 0, 1.0  # of each node down the chain
        while tree.children[node]:
            ((child, x, q_V),) = tree.siblings(node)
            p_V = tree.p_TxV[node]
            rest_V = np.maximum(ratio * p_V - q_V, 0)
            Z = rest_V.sum()
            taken[node], following[node] = taken_share(Z, ratio), rest_V / Z if Z > 0 else p_V
            node, ratio = child, accept_probability(ratio * p_V[x], q_V[x])
        taken[node], following[node] = ratio, tree.p_TxV[node]
        taken[0], mass = 1.0, 1.0
        for node in reversed(taken):
            stop[node] = mass * taken[node]
            mass *= 1 - taken[node]
        return stop, following
