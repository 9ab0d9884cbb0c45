"""The static tree that pays best on given text: ranks counted, not assumed.

At every position the text's next tokens have ranks among the drafter's candidates: the rank path
(r_1, ..., r_N) that a tree must contain to draft them. A tree of rank paths accepts as many tokens
there as the longest prefix of that path it holds, so its mean accepted length on the text is the
sum, over its nodes, of how often the node's path is a prefix. The best tree of T rows is therefore
the root and the T - 1 most frequent prefixes; FastEagle's backbone is the case in which they happen
to be a backbone's. No independence of depths is assumed, unlike products of per-depth rates.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

from specjax.distillation.losses import label_mask
from specjax.drafters.learned import LearnedDrafter
from specjax.models import transformer
from specjax.models.target import Target
from specjax.sharding import fetch
from specjax.trained import TrainedDrafter

FAR = 1 << 20  # rank of a token that the draft vocabulary lacks


@functools.partial(jax.jit, static_argnums=0)
def _ranks(definition: LearnedDrafter, params, target_params, tokens_BxT):
    """int32 BxTxN: rank of x_{t+1+i} at depth i; ties count as better."""
    out = transformer.forward(target_params, definition.target, tokens_BxT, taps=definition.taps)
    hidden, _ = definition.teach(params, target_params, out.taps_BxTxM, tokens_BxT)
    ids = definition.vocab_ids(params)
    places_V = jnp.arange(definition.target.vocab_size)
    if ids is not None:
        places_V = jnp.full_like(places_V, -1).at[ids].set(jnp.arange(ids.size))
    ranks = []
    for i, h in enumerate(hidden, start=1):
        label_BxT = places_V[jnp.pad(tokens_BxT[:, 1 + i :], ((0, 0), (0, 1 + i)))]
        logits = definition.logits(params, target_params, h)
        own = jnp.take_along_axis(logits, jnp.maximum(label_BxT, 0)[..., None], axis=-1)
        rank_BxT = jnp.sum(logits >= own, axis=-1) - 1
        ranks.append(jnp.where(label_BxT < 0, FAR, rank_BxT))
    return jnp.stack(ranks, axis=-1)


def count_prefixes(
    target: Target,
    drafter: TrainedDrafter,
    rows: dict[str, np.ndarray],
    widest: int,
    batch: int = 4,
) -> tuple[collections.Counter, int]:
    """(how often each rank path is a prefix, number of positions) over rows of text.

    Args:
      rows: {"tokens": RxT, "supervised": RxT}; positions whose every depth has a supervised label,
        of the first rows that make whole batches.
      widest: ranks from this one on are not told apart, and no path has them.

    Raises:
      ValueError: a drafter that `teach`es fewer depths than it drafts, or rows without a position.
    """
    definition = drafter.definition
    if not isinstance(definition, LearnedDrafter) or definition.unrolled < definition.depth:
        raise ValueError(f"drafter {drafter.name!r}: its depths are not read out over a text")
    counts, positions = collections.Counter(), 0
    for first in range(0, len(rows["tokens"]) - batch + 1, batch):
        tokens = rows["tokens"][first : first + batch]
        ranks_BxTxN = fetch(_ranks(definition, drafter.params, target.params, tokens))
        supervised = jnp.asarray(rows["supervised"][first : first + batch])
        whole_BxT = np.asarray(label_mask(supervised, ranks_BxTxN.shape[-1])).all(axis=-1)
        found = ranks_BxTxN[whole_BxT]
        positions += len(found)
        for path in map(tuple, found.tolist()):
            for depth, rank in enumerate(path, start=1):
                if rank >= widest:
                    break
                counts[path[:depth]] += 1
    if not positions:
        raise ValueError("rows: no position has a label at every depth")
    return counts, positions


def best_paths(
    target: Target,
    drafter: TrainedDrafter,
    rows: dict[str, np.ndarray],
    nodes: int,
    widest: int = 8,
) -> tuple[tuple[tuple[int, ...], ...], float]:
    """(paths of the best static tree with `nodes` rows, its mean tokens a round on the text)."""
    counts, positions = count_prefixes(target, drafter, rows, widest)
    # A prefix is at least as frequent as what it begins; on ties the shorter one comes first.
    ranked = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    kept = ranked[: nodes - 1]
    if len(kept) < nodes - 1:
        raise ValueError(f"nodes: {nodes} exceed the {len(ranked) + 1} rows that the text asks for")
    return tuple(kept), 1 + sum(counts[path] for path in kept) / positions
