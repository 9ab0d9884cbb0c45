"""What every rule shares: its noise, its view of the target, its result, and the node law.

A verification rule on a drafted tree is a law over where the walk stops and what it emits there:

    (tree, p_TxV, q_TxV or none)  ->  stop_T     probability that the walk ends at node v
                                      next_TxV   law of the extra token emitted at v

The tokens emitted are those on the path to v, then the extra one. A rule is exact if this makes
their joint law the target's own, whatever the draft. `Rule.law` states the law in float64 NumPy,
straight from the definition; `Rule.verify` samples from it on the device.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from specjax.sampling import Sampling, argmax, categorical, filtered_probs
from specjax.trees import DraftTree


@flax.struct.dataclass
class Noise:
    """Uniform numbers in [0, 1) for one sequence and round, never shared with drafting."""

    accept_T: jax.Array  # one for each node of the tree
    token_A: jax.Array  # one for each depth, root included

    @property
    def depth(self) -> int:
        """Most draft tokens that the walk can accept."""
        return self.token_A.shape[-1] - 1


@flax.struct.dataclass
class VerifyOut:
    """The walk's result for one sequence (A = max depth + 1 tokens at most)."""

    path_D: jax.Array  # int32 accepted node rows from depth 1 on, -1 padded
    tokens_A: jax.Array  # int32 accepted tokens, then the extra one, -1 padded
    count: jax.Array  # int32, 1..A


def make_noise(key, nodes: int, depth: int) -> Noise:
    """Fresh noise for a tree of `nodes` rows and the given maximal depth."""
    accept, token = jax.random.split(key)
    return Noise(jax.random.uniform(accept, (nodes,)), jax.random.uniform(token, (depth + 1,)))


@dataclasses.dataclass(frozen=True)
class LogitRows:
    """The target at the tree's rows, filtered only where a rule looks.

    Log-probabilities that are filtered already are logits at temperature 1.
    """

    logits_TxV: jax.Array
    sampling: Sampling = Sampling(1.0)

    def probs(self, row):
        """p_V: what the target would draw from after `row`."""
        return filtered_probs(self.logits_TxV[row], self.sampling)

    def token(self, row, uniform):
        """A draw from p_V."""
        if self.sampling.greedy:
            return argmax(self.logits_TxV[row])
        return categorical(uniform, self.probs(row))

    def best(self, row):
        """The first most probable token."""
        return argmax(self.logits_TxV[row])


@dataclasses.dataclass(frozen=True)
class Tree:
    """A draft as plain NumPy, for laws: children in draw order, invalid nodes left out."""

    tokens: np.ndarray
    children: tuple[tuple[int, ...], ...]
    p_TxV: np.ndarray
    q_TxV: np.ndarray | None  # None: every child is a point mass (it was not sampled)
    force_T: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(T, V)."""
        return self.p_TxV.shape

    def siblings(self, node: int, replacement: bool = False):
        """Yields (child, its token, the law_V it was drawn from) in draw order.

        Without replacement each token drawn leaves the law; where nothing is left of it, drafting
        drew uniformly from the tokens not yet tried.
        """
        law_V = None if self.q_TxV is None else self.q_TxV[node]
        tried = []
        for child in self.children[node]:
            token = self.tokens[child]
            if law_V is None:
                yield child, token, np.eye(self.shape[1])[token]
                continue
            yield child, token, law_V
            if not replacement:
                tried.append(token)
                untried_V = np.ones(len(law_V))
                untried_V[tried] = 0
                left_V = law_V * untried_V
                left_V = left_V if left_V.sum() > 0 else untried_V
                law_V = left_V / max(left_V.sum(), 1.0e-300)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A verification rule: static and hashable; its parameters are dataclass fields.

    Subclasses are one file each and register themselves in `verification/__init__.py`.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]  # whether the emitted law is the target's own, for any draft
    chain_only: ClassVar[bool] = False  # whether it covers single chains only
    forces: ClassVar[bool] = False  # whether it covers masks of nodes to accept anyway
    reads_hidden: ClassVar[bool] = False  # whether `force` wants the target's hidden states
    orderless: ClassVar[bool] = False  # whether it reads parents and tokens, not draw order

    @property
    def draws(self) -> str:
        """How the tree must have been drawn: one of `drafters.proposals.KINDS`."""
        return "top"

    def check(self, sampling: Sampling, drafter) -> None:
        """Raises ValueError, before tracing, for settings that the rule does not cover."""
        if self.draws not in drafter.proposals:
            raise ValueError(
                f"rule {self.name!r} needs a draft drawn {self.draws!r}; drafter "
                f"{drafter.name!r} offers {', '.join(drafter.proposals)}"
            )
        topology = drafter.topology
        if self.chain_only and (topology is None or topology.child_TxC.shape[1] > 1):
            raise ValueError(
                f"rule {self.name!r} verifies one chain; drafter {drafter.name!r} drafts a tree "
                "(give it one candidate a level)"
            )

    def force(self, hidden_TxD):
        """bool_T, nodes accepted whatever the base rule says; for rules that read hidden states."""
        raise NotImplementedError(self.name)

    def verify(self, noise: Noise, draft: DraftTree, rows, force_T=None) -> VerifyOut:
        """Verifies one sequence's tree.

        Args:
          noise: fresh for this sequence and round; its lengths give T and the maximal depth.
          draft: the tree, unbatched.
          rows: the target; rules read only rows they visit.
          force_T: for rules with `forces`, nodes to accept anyway.
        """
        raise NotImplementedError(self.name)

    def law(self, tree: Tree) -> tuple[np.ndarray, np.ndarray]:
        """(stop_T, next_TxV) in float64."""
        raise NotImplementedError(self.name)


# ---- pieces of laws ------------------------------------------------------------------------------


def accept_probability(p: float, q: float) -> float:
    """min(1, p/q); a token that the draft could not have drawn is accepted where p allows it."""
    if q == 0:
        return float(p > 0)
    return min(1.0, p / q)


def taken_share(Z: float, ratio: float) -> float:
    """Z/(Z + 1 - ratio): what block verification takes of a prefix; 1 where both vanish."""
    return Z / (Z + (1 - ratio)) if Z + (1 - ratio) > 0 else 1.0


# ---- pieces of fast paths: the same on the device ------------------------------------------------


def normalised(x_V, otherwise_V):
    """x / sum(x), or `otherwise` where nothing is left of x."""
    total = jnp.sum(x_V)
    return jnp.where(total > 0, x_V / jnp.where(total > 0, total, 1.0), otherwise_V)


def capped_ratio(p, q):
    """`accept_probability`."""
    return jnp.where(q > 0, jnp.minimum(p / jnp.where(q > 0, q, 1.0), 1.0), p > 0)


def capped_share(Z, ratio):
    """`taken_share`."""
    whole = Z + (1 - ratio)
    return jnp.where(whole > 0, Z / jnp.where(whole > 0, whole, 1.0), 1.0)


def child_at(draft: DraftTree, node, rank):
    """(row, whether it is there) of the rank-th child in draw order."""
    child = draft.child_TxC[node, rank]
    return jnp.maximum(child, 0), (child >= 0) & draft.valid_T[jnp.maximum(child, 0)]


def child_law(draft: DraftTree, node, child, rows: LogitRows):
    """q_V that a first `child` of `node` was drawn from: as recorded, else a point mass."""
    if draft.law_TxV is not None:
        return jnp.exp(draft.law_TxV[node])
    V = rows.logits_TxV.shape[-1]
    return jax.nn.one_hot(draft.tokens_T[child], V, dtype=jnp.float32)


def over_siblings(step: Callable, carry, draft: DraftTree, node, rows, replacement: bool):
    """carry after step(carry, child, token, law_V) for every child of `node` in draw order.

    `law_V` is what the child was drawn from, as `Tree.siblings` has it.
    """
    C, V = draft.child_TxC.shape[1], rows.logits_TxV.shape[-1]
    sampled = draft.law_TxV is not None

    def one(rank, state):
        carry, law_V, tried_V = state
        child, there = child_at(draft, node, rank)
        token = draft.tokens_T[child]
        point_V = jnp.arange(V) == token
        now_V = law_V if sampled else point_V.astype(jnp.float32)
        new = step(carry, child, token, now_V)
        carry = jax.tree.map(lambda a, b: jnp.where(there, a, b), new, carry)
        if sampled and not replacement:
            tried_V = tried_V | (point_V & there)
            untried_V = (~tried_V).astype(law_V.dtype)
            left_V = normalised(law_V * untried_V, normalised(untried_V, law_V))
            law_V = jnp.where(there, left_V, law_V)
        return carry, law_V, tried_V

    law_V = jnp.exp(draft.law_TxV[node]) if sampled else jnp.zeros(V)
    start = carry, law_V, jnp.zeros(V, bool)
    return jax.lax.fori_loop(0, C, one, start, unroll=C <= 4)[0]


def finish(draft: DraftTree, node, token, depth: int) -> VerifyOut:
    """The result of a walk that stops at `node` and emits `token` there."""
    at = draft.depth_T[node]
    path, v = [None] * depth, node
    for d in range(depth, 0, -1):  # climb: the node of depth d, where the path is that deep
        path[d - 1] = jnp.where(at >= d, v, -1)
        v = jnp.where(at >= d, draft.parent_T[v], v)
    path_D = jnp.stack(path).astype(jnp.int32) if depth else jnp.zeros(0, jnp.int32)
    accepted_D = jnp.where(path_D >= 0, draft.tokens_T[path_D], -1)
    tokens_A = jnp.pad(accepted_D, (0, 1), constant_values=-1)
    tokens_A = jnp.where(jnp.arange(depth + 1) == at, token, tokens_A)
    return VerifyOut(path_D, tokens_A.astype(jnp.int32), (at + 1).astype(jnp.int32))


def scan_depth(step: Callable, carry, depth: int):
    """carry after `step(carry, d)` for d = 0..depth-1; unrolled where that is short."""
    carry, _ = jax.lax.scan(
        lambda c, d: (step(c, d), None), carry, jnp.arange(depth), unroll=depth <= 8
    )
    return carry
