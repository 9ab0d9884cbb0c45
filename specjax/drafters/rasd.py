"""RASD: what was written before, looked up and fused with another drafter's tree.

Source: arXiv 2503.03434. Each round looks up the newest tokens in the request's own history and in
a corpus, longest suffix first, merges what followed there into a trie, prunes it by what the inner
drafter expects next, and fuses it with the inner drafter's tree by longest prefix. One target
forward verifies the union. Without an inner drafter it is retrieval alone, which trains nothing.

The criterion of pruning and the budgets are not publicly confirmed. Ours: a continuation stays if
its first token is among the `prune_top` that the inner drafter holds most probable (lookup drafters
have no such law: among those that their tree tries first), and nothing is pruned where the inner
draft is empty; of the trie the most frequent rows stay, up to `retrieved_nodes`; and inner rows are
never given up for retrieved ones. Suffixes of 16 down to 2 tokens and continuations of 10 are
REST's (arXiv 2311.08252).

The parameters are the inner drafter's own; the corpus is a constant among its buffers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from specjax.drafters import retrieval
from specjax.drafters.base import Committed, Drafter, Vanilla, join_buffers, split_buffers
from specjax.drafters.fusion import fuse, trie


@dataclasses.dataclass(frozen=True)
class Rasd(Drafter):
    """Retrieved continuations fused with the tree of any drafter that reads what is committed."""

    name: ClassVar[str] = "rasd"

    inner: Drafter | None = None  # None: retrieval alone
    history: bool = True  # whether to look in the request's own tokens
    corpus_size: int = 0  # entries of the corpus index, 0 = no corpus
    max_suffix: int = 16  # tokens that a place must share with the end of the text: at most
    min_suffix: int = 2  # and at least
    hits: int = 8  # R: places read of each source
    continuation: int = 10  # K: tokens read from each
    retrieved_nodes: int = 16  # M: rows of the retrieved trie
    total_nodes: int = 0  # T, root included; 0 = the inner tree and the whole trie
    prune: bool = True
    prune_top: int = 10  # first tokens of the inner drafter's law that may be continued

    def __post_init__(self):
        if not 1 <= self.min_suffix <= self.max_suffix:
            raise ValueError(
                f"min_suffix: {self.min_suffix} must be in [1, max_suffix={self.max_suffix}]"
            )
        if not 1 <= self.hits <= 64:
            raise ValueError(f"hits: {self.hits} must be in [1, 64]")
        if self.continuation < 1 or self.retrieved_nodes < 1:
            raise ValueError("continuation, retrieved_nodes: must be at least 1")
        if self.prune_top < 1:
            raise ValueError(f"prune_top: {self.prune_top} must be at least 1")
        if self.corpus_size < 0 or not (self.history or self.corpus_size):
            raise ValueError(
                f"corpus_size: {self.corpus_size} and no history leave nothing to read"
            )
        if isinstance(self.inner, Rasd):
            raise ValueError("inner: retrieval does not nest")
        if self.inner is not None and self.inner.target != self.target:
            raise ValueError("inner: was made for another target")
        if self.inner is not None:
            object.__setattr__(self, "inner", self.inner.among_others(self.depth))
        drafted = self._drafter.nodes
        if self.total_nodes and not drafted < self.total_nodes <= drafted + self.retrieved_nodes:
            raise ValueError(
                f"total_nodes: {self.total_nodes} must be 0 or in [{drafted + 1}, "
                f"{drafted + self.retrieved_nodes}]: all of the inner tree, and retrieved rows"
            )

    # ---- fields as plain values ------------------------------------------------------------------

    @classmethod
    def of(cls, target, config) -> "Rasd":
        """`inner` is a drafter's name ("" = none), `inner_options` its fields."""
        from specjax.drafters import DRAFTERS  # which lists this drafter too

        config = dict(config)
        name, options = config.pop("inner", ""), config.pop("inner_options", {})
        if name and name not in DRAFTERS:
            raise ValueError(f"inner: {name!r} is unknown; one of {tuple(DRAFTERS)}")
        if options and not name:
            raise ValueError("inner_options: given without inner")
        inner = DRAFTERS[name].of(target, options) if name else None
        return super().of(target, config | {"inner": inner})

    def plain(self) -> dict[str, Any]:
        own = super().plain() | {"inner": ""}
        if self.inner is None:
            return own
        return own | {"inner": self.inner.name, "inner_options": self.inner.plain()}

    def with_budget(self, inner_options=None, **changes) -> "Rasd":
        """Another tree; `inner_options` change the inner drafter's."""
        if inner_options and self.inner is None:
            raise ValueError("inner_options: there is no inner drafter")
        if inner_options:
            changes["inner"] = self._drafter.with_budget(**inner_options)
        return super().with_budget(**changes)

    # ---- shape -----------------------------------------------------------------------------------

    @property
    def _drafter(self) -> Drafter:
        return self.inner or Vanilla(self.target)

    @property
    def _sources(self) -> int:
        return int(self.history) + (self.corpus_size > 0)

    @property
    def nodes(self) -> int:
        return self.total_nodes or self._drafter.nodes + self.retrieved_nodes

    @property
    def depth(self) -> int:
        return max(self._drafter.depth, min(self.continuation, self.retrieved_nodes))

    @property
    def partition(self):
        return self._drafter.partition

    @property
    def taps(self) -> tuple[int, ...]:
        return self._drafter.taps

    @property
    def scratch(self) -> int:
        # The inner drafter takes in as many rows as a fused round commits.
        return self._drafter.scratch + self.depth - self._drafter.depth

    # ---- the inner drafter -----------------------------------------------------------------------

    def init(self, key, target_params):
        params = self._drafter.init(key, target_params)
        if not self.corpus_size:
            return params
        return _with_corpus(params, retrieval.empty_index(self.corpus_size))

    def init_state(self, batch: int, slots: int, dtype):
        """The inner drafter's, with room for all rows that a fused round commits."""
        more = self.depth - self._drafter.depth

        def widen(x):
            if not isinstance(x, Committed):
                return x
            pad = lambda rows: jnp.pad(rows, ((0, 0), (0, more)) + ((0, 0),) * (rows.ndim - 2))  # noqa: E731
            return Committed(*jax.tree.map(pad, (x.tokens_BxA, x.taps_BxAxM)), x.counts_B)

        state = self._drafter.init_state(batch, slots, dtype)
        return jax.tree.map(widen, state, is_leaf=lambda x: isinstance(x, Committed))

    def prefill(self, params, target_params, state, committed, context):
        return self._drafter.prefill(params, target_params, state, committed, context)

    def absorb(self, params, state, committed, tree, scored):
        return self._drafter.absorb(params, state, committed, tree, scored)

    def keep(self, params, state):
        kept = self._drafter.keep(params, state)
        if kept is params or not self.corpus_size:
            return kept
        return _with_corpus(kept, params["buffers"]["corpus"])

    # ---- drafting --------------------------------------------------------------------------------

    def draft(self, params, target_params, state, context, key):
        inner = self._drafter
        if self.prune:
            inner = dataclasses.replace(inner, expected=self.prune_top)
        tree, state = inner.draft(params, target_params, state, context, key)
        corpus = params["buffers"]["corpus"] if self.corpus_size else None

        def one(tree, tokens_S, length):
            found_RxK = self._retrieve(corpus, tokens_S, length)
            if self.prune:
                first_K = tree.expected_K
                if first_K is None:
                    here_T = tree.valid_T & (tree.depth_T == 1)
                    first_K = jnp.where(here_T, tree.tokens_T, retrieval.GAP)
                expected_R = jnp.any(found_RxK[:, :1] == first_K, axis=1)
                expected_R |= ~jnp.any(first_K != retrieval.GAP)  # an empty draft expects nothing
                found_RxK = jnp.where(expected_R[:, None], found_RxK, retrieval.GAP)
            retrieved = trie(found_RxK, 1 + self.retrieved_nodes)
            branches = min(self.retrieved_nodes, self._sources * self.hits)
            return fuse(tree, retrieved, branches, self.depth, self.nodes)

        with jax.named_scope("retrieve"):
            return jax.vmap(one)(tree, context.tokens_BxS, context.lengths_B), state

    def _retrieve(self, corpus, tokens_S, length):
        """int32[., K]: continuations from all sources, those of the longer suffix first."""
        how = tokens_S, length, self.max_suffix, self.min_suffix, self.hits
        found = []
        if self.history:
            match, place_R = retrieval.search_history(*how)
            found.append((match, tokens_S, place_R, length))
        if corpus is not None:
            match, place_R = retrieval.search_index(corpus, *how)
            found.append((match, corpus["tokens"], place_R, self.corpus_size))
        K = self.continuation
        texts_SxRxK = jnp.stack([retrieval.following(*where, K) for _, *where in found])
        longest_first = jnp.argsort(-jnp.stack([match for match, *_ in found]), stable=True)
        return texts_SxRxK[longest_first].reshape(-1, K)

    # ---- training: the inner drafter's -----------------------------------------------------------

    @property
    def trained(self) -> bool:
        return self._drafter.trained

    @property
    def draft_vocab_size(self) -> int:
        return getattr(self._drafter, "draft_vocab_size", 0)

    @property
    def unrolled(self) -> int:
        return self._drafter.unrolled

    def init_head(self, target_params, vocab_ids):
        return self._drafter.init_head(target_params, vocab_ids)

    def teach(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        return self._drafter.teach(params, target_params, taps_BxTxM, tokens_BxT, segments_BxT)

    def normed(self, params, hidden):
        return self._drafter.normed(params, hidden)

    def head(self, params, target_params):
        return self._drafter.head(params, target_params)

    def logits(self, params, target_params, hidden_BxTxD):
        return self._drafter.logits(params, target_params, hidden_BxTxD)

    def vocab_ids(self, params):
        return self._drafter.vocab_ids(params)


def _with_corpus(params, index):
    """The parameters with this corpus in place of any other; None = none."""
    params, buffers = split_buffers(params)
    buffers = {k: v for k, v in buffers.items() if k != "corpus"}
    return join_buffers(params, buffers | ({} if index is None else {"corpus": index}))


def fused(drafter, documents: Sequence[Sequence[int]] | None = None, **settings):
    """A trained drafter with retrieval around it, or a `rasd` drafter with another corpus.

    Args:
      drafter: from `init_drafter`, `load_drafter` or training.
      documents: token ids of the corpus, each document by itself; None = as it is, at first none.
      **settings: fields of `Rasd` to change.

    Raises:
      ValueError: a token outside the vocabulary, or a setting out of range (names the field).
    """
    definition, params = drafter.definition, drafter.params
    if not isinstance(definition, Rasd):
        definition = Rasd(definition.target, definition)
    if documents is not None:
        vocabulary = definition.target.vocab_size
        for i, document in enumerate(documents):
            if len(document) and not 0 <= min(document) <= max(document) < vocabulary:
                raise ValueError(f"documents[{i}]: tokens must be in [0, {vocabulary})")
        index = jax.tree.map(jnp.asarray, retrieval.build_index(documents))
        settings["corpus_size"] = index["tokens"].shape[0]
        params = _with_corpus(params, index if settings["corpus_size"] else None)
    definition = dataclasses.replace(definition, **settings)
    return dataclasses.replace(drafter, definition=definition, params=params)
