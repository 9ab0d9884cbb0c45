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
    """The target at the tree's rows, filtered only where a rule looks."""

    logits_TxV: jax.Array
    sampling: Sampling

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
class LogpRows:
    """The same view of a table of log-probabilities that are filtered already."""

    logp_TxV: jax.Array

    def probs(self, row):
        """p_V."""
        return jnp.exp(self.logp_TxV[row])

    def token(self, row, uniform):
        """A draw from p_V."""
        return categorical(uniform, self.probs(row))

    def best(self, row):
        """The first most probable token."""
        return argmax(self.logp_TxV[row])


@dataclasses.dataclass(frozen=True)
class Tree:
    """A draft as plain NumPy, for laws: children in draw order, invalid nodes left out."""

    tokens: np.ndarray
    parents: np.ndarray
    children: tuple[tuple[int, ...], ...]
    p_TxV: np.ndarray
    q_TxV: np.ndarray | None  # None: every child is a point mass (it was not sampled)
    force_T: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(T, V)."""
        return self.p_TxV.shape

    def drawn_from(self, node: int, child: int) -> np.ndarray:
        """The law that `child` of `node` was drawn from, before anything was drawn there."""
        if self.q_TxV is None:
            return np.eye(self.shape[1])[self.tokens[child]]
        return self.q_TxV[node].copy()


@dataclasses.dataclass(frozen=True)
class Rule:
    """A verification rule: static and hashable; its parameters are dataclass fields.

    Subclasses are one file each and register themselves in `verification/__init__.py`.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]  # whether the emitted law is the target's own, for any draft
    chain_only: ClassVar[bool] = False  # whether it covers single chains only
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
          rows: `LogitRows` or `LogpRows`; rules read only rows they visit.
          force_T: for lossy rules, nodes to accept anyway.
        """
        raise NotImplementedError(self.name)

    def law(self, tree: Tree) -> tuple[np.ndarray, np.ndarray]:
        """(stop_T, next_TxV) in float64."""
        raise NotImplementedError(self.name)


# ---- pieces of fast paths ------------------------------------------------------------------------


def normalised(x_V, otherwise_V):
    """x / sum(x), or `otherwise` where nothing is left of x."""
    total = jnp.sum(x_V)
    return jnp.where(total > 0, x_V / jnp.where(total > 0, total, 1.0), otherwise_V)


def child_at(draft: DraftTree, node, rank):
    """(row, whether it is there) of the rank-th child in draw order."""
    child = draft.child_TxC[node, rank]
    return jnp.maximum(child, 0), (child >= 0) & draft.valid_T[jnp.maximum(child, 0)]


def child_law(draft: DraftTree, node, child, rows):
    """q_V that `child` of `node` was drawn from: as recorded, else a point mass on its token."""
    if draft.law_TxV is not None:
        return jnp.exp(draft.law_TxV[node])
    V = jax.eval_shape(rows.probs, node).shape[-1]
    return jax.nn.one_hot(draft.tokens_T[child], V, dtype=jnp.float32)


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
