"""Sample-and-match: draw the target's token at each visited node and follow the child that has it.

Exact for every tree with distinct sibling tokens that was built without looking at this noise:
what is emitted is, token by token, a draw from the target's own filtered distribution, and the
tree only decides how many such draws one round makes (reference: universal safe rule; at
temperature 0 it is greedy verification).
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from specjax.sampling import Sampling, draw
from specjax.trees import DraftTree
from specjax.verification.base import Rule, VerifyOut


def walk(token_at: Callable, draft: DraftTree, depth: int) -> VerifyOut:
    """Follows target tokens down the tree.

    Args:
      token_at: (depth, row) -> the target's token at that row; called once a depth.
      draft: one sequence's tree.
      depth: its maximal depth.
    """
    rows = jnp.arange(draft.tokens_T.shape[0], dtype=jnp.int32)
    node, alive = jnp.int32(0), jnp.bool_(True)
    path, tokens, count = [], [], jnp.int32(0)
    for d in range(depth + 1):
        token = token_at(d, node)
        tokens.append(jnp.where(alive, token, -1))
        count = count + alive
        if d == depth:
            break
        match_T = (draft.parent_T == node) & (draft.tokens_T == token) & draft.valid_T
        child = jnp.max(jnp.where(match_T, rows, -1))
        alive = alive & (child >= 0)
        path.append(jnp.where(alive, child, -1))
        node = jnp.where(alive, child, node)
    path_D = jnp.stack(path) if path else jnp.zeros(0, jnp.int32)
    return VerifyOut(path_D, jnp.stack(tokens), count)


@dataclasses.dataclass(frozen=True)
class Match(Rule):
    """Sample-and-match."""

    name: ClassVar[str] = "match"
    exact: ClassVar[bool] = True

    def verify(self, key, draft, logits_of, depth, sampling: Sampling) -> VerifyOut:
        def token_at(d, row):
            return draw(jax.random.fold_in(key, d), logits_of(row), sampling)

        return walk(token_at, draft, depth)


@dataclasses.dataclass(frozen=True)
class Greedy(Match):
    """Greedy verification: follow the target's argmax; temperature 0 only."""

    name: ClassVar[str] = "greedy"

    def check(self, sampling: Sampling, drafter) -> None:
        if not sampling.greedy:
            raise ValueError(
                f"rule 'greedy' decodes at temperature 0 only, not {sampling.temperature}; "
                "use 'match'"
            )
