"""The cache: what committing moves, what it leaves alone, and that scratch slots are scratch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.cache import (
    KVCache,
    causal_cache_mask,
    compact,
    empty_cache,
    tree_cache_mask,
)
from specjax.models.config import ModelConfig
from specjax.models.transformer import forward, init_params, logits_of

L, G, S, K, T = 2, 2, 24, 3, 7  # layers, heads, slots, head size, rows of a round

CONFIG = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=4,
)  # fmt: skip


def random_cache(random, lengths, stacked):
    B = len(lengths)
    k, v = (random.randn(L, B, G, S, K).astype(np.float32) for _ in range(2))
    pack = jnp.asarray if stacked else lambda x: tuple(jnp.asarray(layer) for layer in x)
    return KVCache(pack(k), pack(v), jnp.asarray(lengths, jnp.int32))


def arrays(cache):
    """[2, L, B, G, S, K] on the host, however the cache is packed."""
    return np.stack([np.stack(list(cache.k)), np.stack(list(cache.v))])


def moved(before, lengths, node_BxA, first_B):
    """What `compact` is for, one row at a time."""
    after = before.copy()
    for b, length in enumerate(lengths):
        for j, node in enumerate(node_BxA[b]):
            after[:, :, b, :, length + first_B[b] + j] = before[:, :, b, :, length + node]
    return after


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("B", [1, 3])
def test_compact_moves_accepted_rows(B, stacked):
    random = np.random.RandomState(B + stacked)
    commit = jax.jit(compact)
    for _ in range(12):
        lengths = random.randint(0, S - T + 1, B)
        cache = random_cache(random, lengths, stacked)
        before = arrays(cache)
        count = random.randint(0, T + 1, B)  # the root and count - 1 nodes
        # Any distinct rows, in any order: nothing may be read after it was overwritten.
        node = np.stack([random.permutation(np.arange(1, T)) for _ in range(B)])
        for b in range(B):  # surplus entries hold junk in range
            node[b, max(count[b] - 1, 0) :] = random.randint(0, T, T - 1)[max(count[b] - 1, 0) :]
        out = commit(cache, jnp.asarray(node, jnp.int32), jnp.int32(1), jnp.asarray(count))
        new_lengths = lengths + count
        np.testing.assert_array_equal(out.lengths_B, new_lengths)
        expected, after = moved(before, lengths, node, [1] * B), arrays(out)
        for b in range(B):
            committed = slice(0, new_lengths[b])
            np.testing.assert_array_equal(
                after[..., b, :, committed, :], expected[..., b, :, committed, :]
            )
            old = slice(0, lengths[b] + (count[b] > 0))  # the root stays where it is
            np.testing.assert_array_equal(after[..., b, :, old, :], before[..., b, :, old, :])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("B", [1, 3])
def test_compact_moves_one_row_to_a_place_of_its_own(B, stacked):
    """A = 1 with per-row offsets: how a tree whose backbone is in place commits."""
    random = np.random.RandomState(10 + B + stacked)
    commit = jax.jit(compact)
    for _ in range(12):
        lengths = random.randint(0, S - T + 1, B)
        cache = random_cache(random, lengths, stacked)
        before = arrays(cache)
        count = random.randint(1, T, B)
        node = np.array([[random.randint(n - 1, T)] for n in count])
        first = count - 1
        out = commit(
            cache, jnp.asarray(node, jnp.int32), jnp.asarray(first, jnp.int32), jnp.asarray(count)
        )
        np.testing.assert_array_equal(out.lengths_B, lengths + count)
        # One row moves and nothing else does, in scratch or out of it.
        np.testing.assert_array_equal(arrays(out), moved(before, lengths, node, first))


@pytest.mark.parametrize("stacked", [False, True])
def test_committing_nothing_and_committing_what_is_in_place(stacked):
    random = np.random.RandomState(20)
    lengths = np.array([4, 0, 11])
    cache = random_cache(random, lengths, stacked)
    commit = jax.jit(compact)
    places = jnp.broadcast_to(jnp.arange(1, T, dtype=jnp.int32), (3, T - 1))
    for count in (np.zeros(3, int), np.array([3, 0, 7])):
        out = commit(cache, places, jnp.int32(1), jnp.asarray(count))
        np.testing.assert_array_equal(out.lengths_B, lengths + count)
        np.testing.assert_array_equal(arrays(out), arrays(cache))
    # Nothing committed: junk entries may stir the scratch slots, never the committed ones.
    out = commit(cache, places[:, ::-1], jnp.int32(1), jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(out.lengths_B, lengths)
    for b, length in enumerate(lengths):
        np.testing.assert_array_equal(
            arrays(out)[..., b, :, :length, :], arrays(cache)[..., b, :, :length, :]
        )


def test_empty_cache():
    config = CONFIG
    shape = (2, config.num_kv_heads, 9, config.head_dim)
    listed = empty_cache(config, 2, 9, jnp.bfloat16)
    assert [k.shape for k in listed.k] == [v.shape for v in listed.v] == [shape] * 2
    assert listed.k[0].dtype == jnp.bfloat16 and listed.slots == 9
    stacked = empty_cache(config, 2, 9, layers=3, stacked=True)
    assert stacked.k.shape == stacked.v.shape == (3, *shape) and stacked.slots == 9
    for cache in (listed, stacked):
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(cache))
        assert cache.lengths_B.shape == (2,) and cache.lengths_B.dtype == jnp.int32


def test_masks():
    lengths = np.array([3, 0, 6])
    causal = np.asarray(causal_cache_mask(jnp.asarray(lengths), 4, 12))
    random = np.random.RandomState(0)
    shared, own = random.rand(4, 4) < 0.5, random.rand(3, 4, 4) < 0.5
    for visible in (shared, own):
        tree = np.asarray(tree_cache_mask(jnp.asarray(lengths), jnp.asarray(visible), 12))
        assert causal.shape == tree.shape == (3, 4, 12)
        for b, length in enumerate(lengths):
            for t in range(4):
                for s in range(12):
                    assert causal[b, t, s] == (s <= length + t)
                    new = length <= s < length + 4
                    pair = np.broadcast_to(visible, (3, 4, 4))[b, t, s - length if new else 0]
                    assert tree[b, t, s] == (s < length or (new and pair))
    chain_mask = tree_cache_mask(jnp.asarray(lengths), jnp.tri(4, dtype=bool), 12)
    np.testing.assert_array_equal(chain_mask, causal)


def test_slots_past_the_length_are_scratch():
    """Poison in every slot past the length changes no logit by a single bit."""
    config, B, slots = CONFIG, 2, 20
    random = np.random.RandomState(0)
    shapes = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    params = jax.tree.map(lambda w: jnp.asarray(random.randn(*w.shape) / 4, w.dtype), shapes)

    @functools.partial(jax.jit, static_argnums=0)
    def run(rows, cache, tokens):
        mask = causal_cache_mask(cache.lengths_B, rows, slots)
        positions = cache.lengths_B[:, None] + jnp.arange(rows, dtype=jnp.int32)
        out = forward(params, config, tokens, positions, mask, cache)
        return logits_of(params, out.hidden_BxTxD), out.cache

    tokens = random.randint(0, config.vocab_size, (B, 5)).astype(np.int32)
    cache = empty_cache(config, B, slots)
    _, cache = run(5, cache, tokens)
    cache = cache.replace(lengths_B=jnp.array([5, 2], jnp.int32))
    scratch = np.arange(slots) >= np.asarray(cache.lengths_B)[:, None]
    poison = lambda x: jnp.where(scratch[:, None, :, None], 1e3, x)  # noqa: E731
    poisoned = cache.replace(k=jax.tree.map(poison, cache.k), v=jax.tree.map(poison, cache.v))
    logits, _ = run(5, cache, tokens)
    again, _ = run(5, poisoned, tokens)
    np.testing.assert_array_equal(logits, again)
    # The test has teeth: one committed slot more, and the poison shows.
    grown = poisoned.replace(lengths_B=cache.lengths_B + 1)
    assert np.abs(np.asarray(run(5, grown, tokens)[0]) - logits).max() > 0.1
