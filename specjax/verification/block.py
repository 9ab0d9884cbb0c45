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
    child_at,
    child_law,
    finish,
    normalised,
    scan_depth,
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
        depth = noise.token_A.shape[0] - 1

        def residual(node, ratio):
            """(child, whether it is there, p, [ratio p - q]+) at `node`."""
            child, there = child_at(draft, node, 0)
            p_V = rows.probs(node)
            rest_V = jnp.maximum(ratio * p_V - child_law(draft, node, child, rows), 0)
            return child, there, p_V, rest_V

        def step(carry, d):
            node, ratio, best, best_ratio, alive = carry
            child, there, p_V, _ = residual(node, ratio)
            x = draft.tokens_T[child]
            q = child_law(draft, node, child, rows)[x]
            new = jnp.where(q > 0, ratio * p_V[x] / jnp.where(q > 0, q, 1.0), ratio * (p_V[x] > 0))
            new = jnp.minimum(new, 1.0)
            alive &= there
            node, ratio = jnp.where(alive, child, node), jnp.where(alive, new, ratio)
            _, more, _, rest_V = residual(node, ratio)
            Z = jnp.sum(rest_V)
            taken = jnp.where(Z + (1 - ratio) > 0, Z / jnp.maximum(Z + (1 - ratio), 1e-38), 1.0)
            taken = jnp.where(more, taken, ratio)
            win = alive & (noise.accept_T[node] < taken)
            best, best_ratio = jnp.where(win, node, best), jnp.where(win, ratio, best_ratio)
            return node, ratio, best, best_ratio, alive

        start = jnp.int32(0), jnp.float32(1), jnp.int32(0), jnp.float32(1), jnp.bool_(True)
        _, _, node, ratio, _ = scan_depth(step, start, depth)
        _, there, p_V, rest_V = residual(node, ratio)
        law_V = jnp.where(there, normalised(rest_V, p_V), p_V)
        token = categorical(noise.token_A[draft.depth_T[node]], law_V)
        return finish(draft, node, token, depth)

    def law(self, tree: Tree):
        T, V = tree.shape
        stop, following = np.zeros(T), np.zeros((T, V))
        chain, ratios = [0], [1.0]
        while tree.children[chain[-1]]:
            (child,) = tree.children[chain[-1]]
            p_V, x = tree.p_TxV[chain[-1]], tree.tokens[child]
            q_V = tree.drawn_from(chain[-1], child)
            joint = ratios[-1] * p_V[x] / q_V[x] if q_V[x] else ratios[-1] * (p_V[x] > 0)
            ratios.append(min(joint, 1.0))
            chain.append(child)
        mass = 1.0
        for node, ratio in zip(reversed(chain), reversed(ratios), strict=True):
            taken, following[node] = ratio, tree.p_TxV[node]
            if tree.children[node]:
                q_V = tree.drawn_from(node, tree.children[node][0])
                rest_V = np.maximum(ratio * tree.p_TxV[node] - q_V, 0)
                Z = rest_V.sum()
                taken = Z / (Z + (1 - ratio)) if Z + (1 - ratio) > 0 else 1.0
                if Z > 0:
                    following[node] = rest_V / Z
            if node == 0:
                taken = 1.0
            stop[node] = mass * taken
            mass *= 1 - taken
        return stop, following
