"""Sample-and-match: draw the target's token at each visited node and follow the child that has it.

Exact for every tree with distinct sibling tokens that was built without looking at this noise:
what is emitted is, token by token, a draw from the target's own filtered distribution, and the
tree only decides how many such draws one round makes (reference: universal safe rule; at
temperature 0 it is greedy verification).
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from specjax.trees import DraftTree
from specjax.verification.base import Rule, Tree, VerifyOut, finish


def walk(token_at: Callable, draft: DraftTree, depth: int, force_T=None) -> VerifyOut:
    """Follows target tokens down the tree.

    Args:
      token_at: (depth, row) -> the target's token at that row; called once a depth.
      draft: one sequence's tree.
      depth: its maximal depth.
      force_T: where no child has the token, the first forced child is followed instead.
    """
    rows = jnp.arange(draft.tokens_T.shape[0], dtype=jnp.int32)
    node, alive, token = jnp.int32(0), jnp.bool_(True), jnp.int32(-1)
    for d in range(depth + 1):
        drawn = token_at(d, node)
        token = jnp.where(alive, drawn, token)
        if d == depth:
            break
        child_T = (draft.parent_T == node) & draft.valid_T
        child = jnp.max(jnp.where(child_T & (draft.tokens_T == drawn), rows, -1))
        if force_T is not None:
            last = rows.shape[0]
            forced = jnp.min(jnp.where(child_T & force_T, rows, last))
            child = jnp.where((child < 0) & (forced < last), forced, child)
        alive = alive & (child >= 0)
        node = jnp.where(alive, child, node)
    return finish(draft, node, token, depth)


def match_law(tree: Tree, p_TxV) -> tuple[np.ndarray, np.ndarray]:
    """The node law of following draws from p, forced children included."""
    T, V = tree.shape
    stop, following, reach = np.zeros(T), np.zeros((T, V)), np.eye(T)[0]
    for v in range(T):
        left = p_TxV[v].copy()
        for c in tree.children[v]:
            reach[c] += reach[v] * left[tree.tokens[c]]
            left[tree.tokens[c]] = 0
        forced = [c for c in tree.children[v] if tree.force_T[c]]
        if forced:
            reach[forced[0]] += reach[v] * left.sum()
            continue
        stop[v] = reach[v] * left.sum()
        if left.sum() > 0:
            following[v] = left / left.sum()
    return stop, following


@dataclasses.dataclass(frozen=True)
class Match(Rule):
    """Sample-and-match."""

    name: ClassVar[str] = "match"
    exact: ClassVar[bool] = True
    forces: ClassVar[bool] = True
    orderless: ClassVar[bool] = True

    def verify(self, noise, draft, rows, force_T=None) -> VerifyOut:
        token_at = lambda d, row: rows.token(row, noise.token_A[d])  # noqa: E731
        return walk(token_at, draft, noise.depth, force_T)

    def law(self, tree: Tree):
        return match_law(tree, tree.p_TxV)


@dataclasses.dataclass(frozen=True)
class Greedy(Match):
    """Greedy verification: follow the target's argmax; temperature 0 only."""

    name: ClassVar[str] = "greedy"

    def check(self, sampling, drafter) -> None:
        super().check(sampling, drafter)
        if not sampling.greedy:
            raise ValueError(
                f"rule 'greedy' decodes at temperature 0 only, not {sampling.temperature}; "
                "use 'match'"
            )

    def verify(self, noise, draft, rows, force_T=None) -> VerifyOut:
        token_at = lambda d, row: rows.best(row)  # noqa: E731
        return walk(token_at, draft, noise.depth, force_T)

    def law(self, tree: Tree):
        return match_law(tree, np.eye(tree.shape[1])[tree.p_TxV.argmax(axis=1)])
