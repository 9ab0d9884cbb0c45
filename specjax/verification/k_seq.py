"""SpecTr's k-SEQ: k independent chains, one acceptance scale rho for all of them.

Source: Sun et al. 2310.15141. At a node where k chains agree so far, with
beta(rho) = sum_x min(q, p/rho), rho solves 1 - (1 - beta)^k = rho beta on [1, k]; the chains' next
tokens are tried in order, each accepted with probability min(1, p(x)/(rho q(x))). An accepted token
keeps the chains that have it; otherwise the extra token's law is
norm(p - min(q, p/rho) (1 - (1 - beta)^k)/beta).
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
    accept_probability,
    finish,
    normalised,
    scan_depth,
)

HALVINGS = 60
"""Of [1, k] to find rho: float64 is exhausted after that."""


def _beta(p_V, q_V, rho, xp):
    """Mass of min(q, p/rho)."""
    return xp.minimum(q_V, p_V / rho).sum()


def _halve(p_V, q_V, k, low, high, xp):
    """The half of [low, high] that holds rho."""
    rho = (low + high) / 2
    beta = _beta(p_V, q_V, rho, xp)
    above = 1 - (1 - beta) ** k >= rho * beta  # the root is not below rho
    return xp.where(above, rho, low), xp.where(above, high, rho)


def _residual(p_V, q_V, rho, beta, k, xp):
    """p - min(q, p/rho) (1 - (1 - beta)^k)/beta, clipped at rounding."""
    share = (1 - (1 - beta) ** k) / xp.where(beta > 0, beta, 1.0)
    return xp.maximum(p_V - xp.minimum(q_V, p_V / rho) * share, 0)


@dataclasses.dataclass(frozen=True)
class KSeq(Rule):
    """k-SEQ over chains that share the root."""

    name: ClassVar[str] = "k_seq"
    exact: ClassVar[bool] = True

    @property
    def draws(self) -> str:
        return "chains"

    def verify(self, noise, draft, rows, force_T=None) -> VerifyOut:
        depth = noise.depth
        k = draft.child_TxC.shape[1]
        if draft.law_TxV is None:
            raise ValueError("rule 'k_seq': the draft's law was not recorded")

        def below(at_K, active_K, level):
            """Each active chain's next node, and whether it has one."""
            first_K = draft.child_TxC[0]
            next_K = jnp.where(level == 0, first_K, draft.child_TxC[at_K, 0])
            row_K = jnp.maximum(next_K, 0)
            return row_K, active_K & (next_K >= 0) & draft.valid_T[row_K]

        def laws(node, count):
            p_V, q_V = rows.probs(node), jnp.exp(draft.law_TxV[node])
            k = count.astype(jnp.float32)
            halve = lambda _, bounds: _halve(p_V, q_V, k, *bounds, jnp)  # noqa: E731
            rho, _ = jax.lax.fori_loop(0, HALVINGS, halve, (jnp.float32(1), k))
            rho = jnp.where(count <= 1, 1.0, rho)
            return p_V, q_V, rho, _beta(p_V, q_V, rho, jnp), k

        def step(carry, level):
            node, at_K, active_K, alive = carry
            next_K, there_K = below(at_K, active_K, level)
            p_V, q_V, rho, _, _ = laws(node, jnp.sum(there_K))
            x_K = draft.tokens_T[next_K]
            accepted_K = there_K & (noise.accept_T[next_K] * rho * q_V[x_K] < p_V[x_K])
            taken = jnp.argmax(accepted_K)
            alive_now = alive & jnp.any(accepted_K)
            same_K = there_K & (x_K == x_K[taken])
            first = next_K[jnp.argmax(same_K)]
            node = jnp.where(alive_now, first, node)
            at_K = jnp.where(alive_now, next_K, at_K)
            active_K = jnp.where(alive_now, same_K, active_K)
            return node, at_K, active_K, alive_now

        start = jnp.int32(0), jnp.zeros(k, jnp.int32), jnp.ones(k, bool), jnp.bool_(True)
        node, at_K, active_K, _ = scan_depth(step, start, depth)
        _, there_K = below(at_K, active_K, draft.depth_T[node])
        p_V, q_V, rho, beta, count = laws(node, jnp.sum(there_K))
        left_V = _residual(p_V, q_V, rho, beta, count, jnp)
        law_V = jnp.where(jnp.any(there_K), normalised(left_V, p_V), p_V)
        token = categorical(noise.token_A[draft.depth_T[node]], law_V)
        return finish(draft, node, token, depth)

    def law(self, tree: Tree):
        if tree.q_TxV is None:
            raise ValueError("rule 'k_seq': the draft's law was not recorded")
        T, V = tree.shape
        stop, following = np.zeros(T), np.zeros((T, V))

        def visit(active, mass):
            """`active`: the nodes at which the agreeing chains stand, first chain first."""
            node = active[0]
            stand = [c for a in active for c in tree.children[a]]
            p_V = tree.p_TxV[node]
            if not stand:
                stop[node], following[node] = stop[node] + mass, p_V
                return
            q_V, k = tree.q_TxV[node], len(stand)
            rho, high = 1.0, k
            for _ in range(HALVINGS if k > 1 else 0):
                rho, high = _halve(p_V, q_V, k, rho, high, np)
            beta = _beta(p_V, q_V, rho, np)
            for x in dict.fromkeys(tree.tokens[c] for c in stand):
                taken, missed = 0.0, 1.0
                for c in stand:
                    y = tree.tokens[c]
                    accept = accept_probability(p_V[y], rho * q_V[y])
                    taken += missed * accept * (y == x)
                    missed *= 1 - accept
                visit([c for c in stand if tree.tokens[c] == x], mass * taken)
            stop[node] += mass * missed
            left_V = _residual(p_V, q_V, rho, beta, k, np)
            following[node] = left_V / left_V.sum() if left_V.sum() > 0 else p_V

        visit([0], 1.0)
        return stop, following
