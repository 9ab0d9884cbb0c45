"""The index and both searches against slices of Python lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.drafters import retrieval
from specjax.drafters.retrieval import GAP, build_index, empty_index, following

LONGEST, HITS = 4, 3


def random_documents(rng, alphabet):
    """Few and many, short and long, some of them repeated."""
    documents = [
        rng.integers(alphabet, size=n).tolist() for n in rng.integers(0, 12, rng.integers(1, 9))
    ]
    return documents + documents[: rng.integers(0, 3)]


def places_of(documents):
    """[(place, what comes before it backwards, what follows)] of places with both, by document."""
    found, start = [], 0
    for d in documents:
        found += [(start + e, d[:e][::-1], d[e:]) for e in range(1, len(d))]
        start += len(d) + 1
    return found


def shared(a, b):
    """Length of the common prefix."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def longest_match(places, text, shortest):
    """(suffix length, the places after its occurrences): backing off one token at a time."""
    for n in range(LONGEST, shortest - 1, -1):
        suffix = text[::-1][:n]
        hits = [p for p in places if len(suffix) == n and p[1][:n] == suffix]
        if hits:
            return n, hits
    return 0, []


@pytest.mark.parametrize("alphabet", [1, 2, 5])
def test_the_index_is_sorted_by_context(alphabet):
    rng = np.random.default_rng(alphabet)
    for _ in range(60):
        documents = random_documents(rng, alphabet)
        index = build_index(documents)
        stream = [t for d in documents for t in (*d, GAP)]
        assert index["tokens"].tolist() == stream
        expected = [p[0] for p in sorted(places_of(documents), key=lambda p: (p[1], p[0]))]
        zeros = len(stream) - len(expected)
        assert index["order"].tolist() == [0] * zeros + expected


def test_no_documents_no_index():
    assert {k: v.shape for k, v in build_index([]).items()} == {"tokens": (0,), "order": (0,)}
    assert build_index([[], [3]])["order"].tolist() == [0, 0, 0]


def padded(rng, text, size=24):
    """The text, then junk that must not be looked at."""
    return jnp.asarray([*text, *rng.integers(5, size=size - len(text))], jnp.int32)


@pytest.mark.parametrize("shortest", [1, 3])
def test_searching_the_corpus_is_backing_off_over_all_of_it(shortest):
    rng = np.random.default_rng(shortest)
    search = jax.jit(retrieval.search_index, static_argnums=(3, 4, 5))
    size, seen = 100, set()
    for _ in range(150):
        documents = random_documents(rng, 3)
        missing = size - sum(len(d) + 1 for d in documents)
        documents += [[5] * (missing - 1)]  # one shape, one compilation; no query has a 5
        index = build_index(documents)
        text = rng.integers(3, size=rng.integers(1, 9)).tolist()
        match, places = search(index, padded(rng, text), len(text), LONGEST, shortest, HITS)
        n, hits = longest_match(places_of(documents), text, shortest)
        hits = [p for p, *_ in sorted(hits, key=lambda p: (p[1], p[0]))]
        spread = [hits[r * len(hits) // HITS] for r in range(HITS)] if len(hits) > HITS else hits
        assert int(match) == n
        assert places.tolist() == spread + [-1] * (HITS - len(spread))
        seen |= {("length", n), ("hits", min(len(hits), HITS + 1))}
    assert len(seen) > 6 - shortest


def test_nothing_is_found_in_an_empty_index():
    match, places = retrieval.search_index(empty_index(9), jnp.arange(5), 5, LONGEST, 1, HITS)
    assert int(match) == 0 and places.tolist() == [-1] * HITS


@pytest.mark.parametrize("shortest", [1, 3])
def test_searching_the_history_finds_the_newest_of_the_longest(shortest):
    rng = np.random.default_rng(shortest)
    search = jax.jit(retrieval.search_history, static_argnums=(2, 3, 4))
    for _ in range(150):
        text = rng.integers(rng.integers(1, 4) + 1, size=rng.integers(1, 20)).tolist()
        match, places = search(padded(rng, text), len(text), LONGEST, shortest, HITS)
        n, hits = longest_match(places_of([text]), text, shortest)
        newest = [p for p, *_ in reversed(hits)][:HITS]
        assert int(match) == n
        assert places.tolist() == newest + [-1] * (HITS - len(newest))


def test_continuations_end_with_their_document():
    rng = np.random.default_rng(0)
    documents = random_documents(rng, 9)
    places = places_of(documents)
    tokens = jnp.asarray(build_index(documents)["tokens"])
    found = following(tokens, jnp.array([p for p, *_ in places] + [-1]), len(tokens), 5).tolist()
    for row, (_, _, rest) in zip(found, places, strict=False):
        assert row == (rest + [GAP] * 5)[:5]
    assert found[-1] == [GAP] * 5


def test_continuations_overlap_themselves():
    """Copying token by token, the copies at the end included."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 9):
        text, place_R = rng.integers(9, size=n).tolist(), list(range(n))
        found = following(padded(rng, text), jnp.array(place_R), n, 7).tolist()
        for row, place in zip(found, place_R, strict=True):
            copied = list(text)
            for j in range(7):
                copied.append(copied[place + j])
            assert row == copied[n:]


def test_matching_counts_tokens_from_the_nearest():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (rng.integers(2, size=rng.integers(1, 7)).tolist() for _ in range(2))
        contexts = [retrieval.context(jnp.asarray(x), len(x), LONGEST) for x in (a, b)]
        assert int(retrieval.matched(*contexts)) == min(shared(a[::-1], b[::-1]), LONGEST)
