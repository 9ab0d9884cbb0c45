"""What a verification rule is: a law over the tree's nodes, written for one sequence."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import flax.struct
import jax

from specjax.sampling import Sampling
from specjax.trees import DraftTree


@flax.struct.dataclass
class VerifyOut:
    """The walk's result for one sequence (A = max depth + 1 tokens at most)."""

    path_D: jax.Array  # int32 accepted node rows from depth 1 on, -1 padded
    tokens_A: jax.Array  # int32 accepted tokens, then the extra one, -1 padded
    count: jax.Array  # int32, 1..A


@dataclasses.dataclass(frozen=True)
class Rule:
    """A verification rule: static and hashable; its parameters are dataclass fields.

    Subclasses are one file each and register themselves in `verification/__init__.py`.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]  # whether the emitted law is the target's own, for any draft
    needs_law: ClassVar[bool] = False  # whether it reads DraftTree.law_TxV

    def check(self, sampling: Sampling, drafter) -> None:
        """Raises ValueError, before tracing, for settings that the rule does not cover."""

    def verify(
        self, key, draft: DraftTree, logits_of: Callable, depth: int, sampling: Sampling
    ) -> VerifyOut:
        """Verifies one sequence's tree.

        Args:
          key: fresh for this sequence and round, never shared with drafting.
          draft: the tree, unbatched.
          logits_of: row -> the target's raw logits_V there; rules read only rows they visit.
          depth: the tree's maximal depth, static.
          sampling: the shared filter, static.
        """
        raise NotImplementedError(self.name)
