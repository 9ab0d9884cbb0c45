"""Retrieval by the longest suffix: what followed where the newest tokens stood before.

Sources: the request's own history (prompt lookup) and a corpus (REST, arXiv 2311.08252), searched
longest suffix first, as RASD does (arXiv 2503.03434). A place e in a token stream is described by
its context, the tokens before it read backwards. The corpus keeps its places sorted by context, so
that one binary search finds the longest match of all suffix lengths at once: it is a neighbour of
where the query would stand. (Sorting by what follows, a suffix array proper, would take one search
for every length.) Static shapes throughout; everything but `build_index` is for one sequence.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

GAP = -1
"""Stands between documents: it equals no token, and nothing is continued across it."""


# ---- the corpus, on the host ---------------------------------------------------------------------


def build_index(documents: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """The searchable form of a corpus.

    Args:
      documents: token ids, each document by itself.

    Returns:
      {"tokens": int32[N], every document followed by a GAP; "order": int32[N], the places with a
      token before them and one after them, sorted by their whole context (equal ones as they
      stand), behind as many zeros as there are other places}: place 0 has no context and so comes
      first. Prefix doubling; a few sorts of N integers.
    """
    pieces = [np.append(np.asarray(d, np.int32), np.int32(GAP)) for d in documents]
    tokens = np.concatenate([np.zeros(0, np.int32), *pieces])
    N, places = len(tokens), np.arange(len(tokens))
    before = np.append(np.int32(GAP), tokens[:-1])[:N]
    start = np.maximum.accumulate(np.where(before == GAP, places, 0))
    by_rank, rank = _ranked(before.astype(np.int64))  # of contexts by their nearest token alone
    width, classes = 1, -1
    while N and rank[by_rank[-1]] != classes:
        classes = int(rank[by_rank[-1]])
        # Contexts that end within `width` tokens go on as the empty one does: rank 0.
        further = np.where(places - width > start, rank[np.maximum(places - width, 0)], 0)
        by_rank, rank = _ranked(rank * (classes + 1) + further)
        width *= 2
    found = by_rank[(before[by_rank] != GAP) & (tokens[by_rank] != GAP)]
    order = np.concatenate([np.zeros(N - len(found), np.int64), found])
    return {"tokens": tokens, "order": order.astype(np.int32)}


def _ranked(key_N) -> tuple[np.ndarray, np.ndarray]:
    """(places sorted by key, equal ones as they stand; rank of each place's key from 0 on)."""
    by_key = np.argsort(key_N, kind="stable")
    sorted_N = key_N[by_key]
    rank = np.empty_like(key_N)
    rank[by_key] = np.cumsum(np.append(False, sorted_N[1:] != sorted_N[:-1])[: len(key_N)])
    return by_key, rank


def empty_index(size: int) -> dict[str, jax.Array]:
    """An index of `size` entries in which nothing is found."""
    return {"tokens": jnp.full(size, GAP, jnp.int32), "order": jnp.zeros(size, jnp.int32)}


# ---- searching, on the device --------------------------------------------------------------------


def context(tokens_N, place, width: int):
    """int32[width]: the tokens before a place, nearest first; GAP where the stream begins."""
    at = place - 1 - jnp.arange(width)
    return jnp.where(at >= 0, tokens_N[jnp.maximum(at, 0)], GAP)


def matched(context_W, query_W):
    """How many tokens two contexts share."""
    same_W = (context_W == query_W) & (query_W != GAP)
    return jnp.sum(jnp.cumprod(same_W.astype(jnp.int32)))


def search_history(tokens_S, length, longest: int, shortest: int, hits: int):
    """Earlier places of one sequence with the same context as its end.

    Args:
      tokens_S: junk from `length` on.
      longest, shortest: suffix lengths to try, at least 1.
      hits: R, places wanted; at most S.

    Returns:
      (match, place_R): the longest suffix length that occurred before, 0 if none did, and the R
      newest places after such occurrences, newest first; -1 where there are no more.
    """
    places_S = jnp.arange(tokens_S.shape[0], dtype=jnp.int32)
    query_W = context(tokens_S, length, longest)
    alike_S = (places_S > 0) & (places_S < length)
    match_S = jnp.zeros_like(places_S)
    for j in range(longest):  # the j-th token before a place: the stream moved right by j + 1
        moved_S = jnp.pad(tokens_S, (j + 1, 0), constant_values=GAP)[: len(places_S)]
        alike_S &= (moved_S == query_W[j]) & (query_W[j] != GAP)
        match_S += alike_S
    match = jnp.max(match_S)
    match = jnp.where(match >= shortest, match, 0)
    place_R, _ = jax.lax.top_k(jnp.where((match_S == match) & (match > 0), places_S, -1), hits)
    return match, place_R


def search_index(index, tokens_S, length, longest: int, shortest: int, hits: int):
    """Places of a corpus with the same context as the end of a sequence.

    Args and result as for `search_history`; where there are more than R places, R of them evenly
    spread over those found, in order of context.
    """
    corpus_N, order_N = index["tokens"], index["order"]
    N = order_N.shape[0]
    query_W = context(tokens_S, length, longest)

    def first(width, beyond):
        """The first entry whose context is not below the query's `width` last tokens (or above)."""

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) // 2
            found_W = context(corpus_N, order_N[jnp.minimum(middle, N - 1)], longest)
            differs_W = (found_W != query_W) & (jnp.arange(longest) < width)
            at = jnp.argmax(differs_W)
            below = jnp.where(jnp.any(differs_W), found_W[at] < query_W[at], beyond)
            low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
            return jnp.where(bounds[0] < bounds[1], jnp.stack([low, high]), bounds)

        bounds = jnp.array([0, N], jnp.int32)
        return jax.lax.fori_loop(0, N.bit_length(), halve, bounds)[0]

    whole = jnp.sum(query_W != GAP)
    near = first(whole, False) + jnp.array([-1, 0])
    near_2xW = jax.vmap(lambda i: context(corpus_N, order_N[i], longest))(near.clip(0, N - 1))
    match = jnp.max(jax.vmap(matched, (0, None))(near_2xW, query_W))
    match = jnp.where(match >= shortest, match, 0)
    low, high = jax.vmap(first, (None, 0))(match, jnp.array([False, True]))
    count = jnp.where(match > 0, high - low, 0)
    rank_R = jnp.arange(hits, dtype=jnp.int32)
    spread_R = rank_R * (count // hits) + rank_R * (count % hits) // hits  # rank * count // hits
    entry_R = low + jnp.where(count > hits, spread_R, rank_R)
    place_R = jnp.where(rank_R < count, order_N[jnp.minimum(entry_R, N - 1)], -1)
    return match, place_R


def following(tokens_N, place_R, end, count: int):
    """int32[R, count]: the tokens from each place on; GAP after a document's end or where < 0.

    A continuation that reaches `end` goes on with what it has read, as if that stood there already:
    text that goes in circles is drafted as far as any other.
    """
    at_RxK = place_R[:, None] + jnp.arange(count) % jnp.maximum(end - place_R, 1)[:, None]
    found_RxK = tokens_N[jnp.maximum(at_RxK, 0)]
    there_RxK = (found_RxK != GAP) & (place_R >= 0)[:, None]
    there_RxK = jnp.cumprod(there_RxK.astype(jnp.int32), axis=1) > 0
    return jnp.where(there_RxK, found_RxK, GAP)
