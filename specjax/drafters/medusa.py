"""Medusa: one residual head a depth on the target's last hidden state, on a static sparse tree.

Source: arXiv 2401.10774. Head i maps x, the LM head's input at the last committed row, to
x + SiLU(W_i x + b_i) and reads out the token i places after the root; no head sees the root or
another head's token, so the tree is a Cartesian product: the token of a node is its depth's
rank-r best, whatever its parent. Training leaves the target as it is (the paper's Medusa-1).

Our choices. W and b start at zero: every head begins as the target's own LM head (the released
code leaves b at random). Heads read out with the target's frozen matrix instead of D x V copies of
it, trained head by head: at a vocabulary of 32 thousand such a copy outweighs the rest of a thin
drafter many times over. Several blocks a head have weights of their own (the released code repeats
one). The default tree is the best one under assumed acceptance rates (below);
`paths=trees.best_first(measured, nodes)` is the best one under measured rates.
"""

import dataclasses
import functools
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from specjax.drafters.base import Committed
from specjax.drafters.features import last_rows
from specjax.drafters.parallel import ParallelDrafter
from specjax.models.linear import linear
from specjax.trees import Topology, best_first, chains, paths, rank_paths

# What the default tree assumes: rank r of depth i + 1 is right, everything before it being right,
# with chance FIRST * FADE**i / (r + 1)**2. One depth's chances sum to less than 1 (0.6 * pi^2/6),
# the second candidate gets a quarter of the first one's, and a head fades with its distance.
FIRST, FADE, RANKS = 0.6, 0.8, 10


@functools.cache
def default_paths(depth: int, nodes: int, ranks: int = RANKS) -> tuple[tuple[int, ...], ...]:
    """Rank paths of the tree of `nodes` drafted nodes that suits the assumed acceptance best."""
    chances = [[FIRST * FADE**i / (r + 1) ** 2 for r in range(ranks)] for i in range(depth)]
    return best_first(chances, nodes)


@flax.struct.dataclass
class MedusaState:
    """What the next draft reads."""

    hidden_BxD: jax.Array  # the LM head's input at the last committed row


@dataclasses.dataclass(frozen=True)
class Medusa(ParallelDrafter):
    """Independent heads over the target's last hidden state."""

    name: ClassVar[str] = "medusa"
    partition: ClassVar = (
        ("heads/[0-9]+/[0-9]+/fc", ("tensor", "fsdp")),
        ("heads/[0-9]+/[0-9]+/bias", (None,)),
        *ParallelDrafter.partition,
    )

    heads: int = 4  # N: trained depth
    blocks: int = 1  # residual blocks a head
    draft_depth: int = 0  # heads used when drafting; 0 = all
    tree_nodes: int = 0  # drafted nodes of the default tree; 0 = 4 * depth
    paths: tuple[tuple[int, ...], ...] = ()  # rank paths of another tree, () = the default one

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1 or self.blocks < 1:
            raise ValueError("heads, blocks: must be at least 1")
        if not 0 <= self.draft_depth <= self.heads:
            raise ValueError(f"draft_depth: {self.draft_depth} must be in [0, heads={self.heads}]")
        if not self.paths:
            if not 0 <= self.tree_nodes <= self._most:
                raise ValueError(
                    f"tree_nodes: {self.tree_nodes} must be in [0, {self._most}] for "
                    f"{self._levels} levels (0 is 4 a level)"
                )
            return
        if self.tree_nodes or self.draft_depth:
            raise ValueError("paths: they are the whole tree; leave tree_nodes, draft_depth at 0")
        # One value a tree, also from a config file's lists.
        object.__setattr__(self, "paths", rank_paths(self.paths))
        deepest, widest = len(self.paths[-1]), max(map(max, self.paths))
        if deepest > self.heads or widest >= self._words:
            raise ValueError(
                f"paths: depth {deepest} and rank {widest} do not fit {self.heads} heads over "
                f"{self._words} tokens"
            )

    @property
    def _words(self) -> int:
        return self.draft_vocab_size or self.target.vocab_size

    @property
    def _ranks(self) -> int:
        return min(RANKS, self._words)

    @property
    def _levels(self) -> int:
        return self.draft_depth or self.heads

    @property
    def _most(self) -> int:
        """Nodes of the largest default tree."""
        return sum(self._ranks**level for level in range(1, self._levels + 1))

    @property
    def _tree(self) -> tuple[tuple[int, ...], ...]:
        """Rank paths of the tree of best tokens, row by row."""
        nodes = self.tree_nodes or min(4 * self._levels, self._most)
        return self.paths or default_paths(self._levels, nodes, self._ranks)

    @property
    def depth(self) -> int:
        return len(self._tree[-1])

    @property
    def topology(self) -> Topology:
        if self.proposal.kind == "chains":  # as many as the nodes feed
            return chains(len(self._tree) // self.depth, self.depth)
        return paths(self._tree)

    @property
    def ranks(self) -> np.ndarray:
        return np.array([path[-1] for path in self._tree])

    @property
    def taps(self) -> tuple[int, ...]:
        return (self.target.num_layers,)  # the LM head's input

    @property
    def unrolled(self) -> int:
        return self.heads

    def init(self, key, target_params):
        D = self.target.hidden_size
        block = lambda: {"fc": jnp.zeros((D, D)), "bias": jnp.zeros(D)}  # noqa: E731
        params = {"heads": [[block() for _ in range(self.blocks)] for _ in range(self.heads)]}
        if self.draft_vocab_size:
            params["buffers"] = {"vocab_ids": jnp.arange(self.draft_vocab_size, dtype=jnp.int32)}
        return params

    def _heads(self, params, x_BxTxD, depth: int):
        """The first `depth` heads' outputs, a list of BxTxD."""
        hidden = []
        for i, head in enumerate(params["heads"][:depth]):
            x = x_BxTxD
            with jax.named_scope(f"head_{i}"):
                for block in head:
                    x = x + jax.nn.silu(linear(x, block["fc"]) + block["bias"].astype(x.dtype))
            hidden.append(x)
        return hidden

    def normed(self, params, hidden):
        return hidden  # the target's final norm came first

    # ---- state -------------------------------------------------------------------------------

    def init_state(self, batch: int, slots: int, dtype) -> MedusaState:
        return MedusaState(jnp.zeros((batch, self.target.hidden_size), dtype))

    def prefill(self, params, target_params, state, committed, context) -> MedusaState:
        return self.absorb(params, state, committed, None, None)

    def absorb(self, params, state, committed: Committed, tree, scored) -> MedusaState:
        last_BxD = last_rows(committed.taps_BxAxM, committed.counts_B)
        some_Bx1 = committed.counts_B[:, None] > 0  # a row that is done commits nothing
        return MedusaState(jnp.where(some_Bx1, last_BxD, state.hidden_BxD))

    def draft(self, params, target_params, state: MedusaState, context, key):
        hidden = self._heads(params, state.hidden_BxD[:, None], self.depth)
        hidden_BxNxD = jnp.concatenate(hidden, axis=1)
        tree = self.draw_tree(params, target_params, hidden_BxNxD, context.root_B(), key)
        return tree, state

    # ---- training ----------------------------------------------------------------------------

    def teach(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        hidden = self._heads(params, taps_BxTxM, self.heads)
        return hidden, hidden
