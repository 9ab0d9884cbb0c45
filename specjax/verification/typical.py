"""Typical acceptance (Medusa): keep what the target finds plausible. Lossy.

Source: Cai et al. 2401.10774. A drafted token x is accepted when
p(x) > min(epsilon, delta exp(-H(p))); the longest accepted path wins, ties by its log-probability.
No value of the parameters makes it sample from the target.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from specjax.verification.base import Rule, Tree, VerifyOut, finish

_FLOOR = 1e-5  # added to p inside the entropy's logarithm, as Medusa does


@dataclasses.dataclass(frozen=True)
class Typical(Rule):
    """Typical acceptance with threshold min(epsilon, delta exp(-entropy))."""

    name: ClassVar[str] = "typical"
    exact: ClassVar[bool] = False
    forces: ClassVar[bool] = True
    orderless: ClassVar[bool] = True

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self):
        if not self.epsilon > 0 or not self.delta > 0:
            raise ValueError(
                f"rule 'typical': epsilon {self.epsilon} and delta {self.delta} must be positive"
            )

    def verify(self, noise, draft, rows, force_T=None) -> VerifyOut:
        depth, T = noise.depth, draft.tokens_T.shape[0]
        nodes = jnp.arange(T)

        def threshold(v):
            p_V = rows.probs(v)
            entropy = -jnp.sum(p_V * jnp.log(p_V + _FLOOR))
            return p_V, jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))

        def judge(v):  # (accepts, log p) of each node as a child of v
            p_V, limit = threshold(v)
            p_T = p_V[draft.tokens_T]
            return p_T > limit, jnp.log(jnp.maximum(p_T, 1e-38))

        def one(_, v):
            return None, judge(v)

        _, (accepts_TxT, logp_TxT) = jax.lax.scan(one, None, nodes)
        parent_T = jnp.maximum(draft.parent_T, 0)
        good_T = accepts_TxT[parent_T, nodes] & draft.valid_T
        if force_T is not None:
            good_T |= force_T & draft.valid_T

        def inherit(carry, v):  # parents come before children
            reached_T, score_T = carry
            root = v == 0
            reached_T = reached_T.at[v].set(root | (good_T[v] & reached_T[parent_T[v]]))
            score = score_T[parent_T[v]] + logp_TxT[parent_T[v], v]
            return (reached_T, score_T.at[v].set(jnp.where(root, 0.0, score))), None

        (reached_T, score_T), _ = jax.lax.scan(inherit, (jnp.zeros(T, bool), jnp.zeros(T)), nodes)
        longest = jnp.max(jnp.where(reached_T, draft.depth_T, 0))
        best_T = jnp.where(reached_T & (draft.depth_T == longest), score_T, -jnp.inf)
        node = jnp.argmax(best_T).astype(jnp.int32)
        token = rows.token(node, noise.token_A[draft.depth_T[node]])
        return finish(draft, node, token, depth)

    def law(self, tree: Tree):
        T, V = tree.shape
        stop, following = np.zeros(T), np.zeros((T, V))
        reached, best = [(0, 0.0, 0)], None  # (depth, log-probability, node)
        while reached:
            depth, score, v = reached.pop()
            if best is None or (depth, score, -v) > (best[0], best[1], -best[2]):
                best = depth, score, v
            p_V = tree.p_TxV[v]
            limit = min(self.epsilon, self.delta * np.exp(np.sum(p_V * np.log(p_V + _FLOOR))))
            for c in tree.children[v]:
                p = p_V[tree.tokens[c]]
                if p > limit or tree.force_T[c]:
                    reached.append((depth + 1, score + np.log(max(p, 1e-38)), c))
        stop[best[2]] = 1.0
        following[best[2]] = tree.p_TxV[best[2]]
        return stop, following
