"""The forward pass against a float64 NumPy oracle, and against itself in every form it has."""

import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest
from families import FAMILIES, weights, write_folder

from specjax.cache import causal_cache_mask, empty_cache, tree_cache_mask
from specjax.models.config import read_config
from specjax.models.hf import load_params
from specjax.models.layers import recomputed_layers
from specjax.models.transformer import (
    causal_mask,
    forward,
    logits_of,
    stack_layers,
    unstack_layers,
)
from specjax.trees import chain, paths, visible_from_parents

# Biases, query/key norm, grouped heads and an odd head size at once.
RAW = FAMILIES["qwen3-untied"] | {"num_hidden_layers": 3, "rope_theta": 10000.0}
TENSORS = weights(RAW, seed=5)
TAPS = (2, 0)
B, N, SLOTS = 3, 24, 40  # rows and length of the uncached runs, cache slots
CLOSE = dict(rtol=1e-4, atol=1e-4)
MASKED = (np.arange(N) * 7 % 11)[:, None] >= (np.arange(N) * 7 % 11)  # any reflexive relation


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(config, {"unrolled": params, "scanned": the same weights stacked})."""
    folder = write_folder(tmp_path_factory.mktemp("model"), RAW, TENSORS)
    config = read_config(folder)
    params = jax.tree.map(jnp.asarray, load_params(folder, config))
    return config, {"unrolled": params, "scanned": stack_layers(params)}


@functools.partial(jax.jit, static_argnums=1)
def run(params, config, tokens, positions, mask):
    out = forward(params, config, tokens, positions, mask, taps=TAPS)
    return logits_of(params, out.hidden_BxTxD), out.taps_BxTxM


@functools.partial(jax.jit, static_argnums=1)
def run_cached(params, config, tokens, positions, mask, cache):
    out = forward(params, config, tokens, positions, mask, cache, TAPS)
    return logits_of(params, out.hidden_BxTxD), out.taps_BxTxM, out.cache


def plain(model, tokens_BxN, form="unrolled"):
    """Logits and taps of causal decoding without a cache."""
    config, params = model
    positions = np.broadcast_to(np.arange(N, dtype=np.int32), (B, N))
    mask = np.broadcast_to(np.tri(N, dtype=bool), (B, N, N))
    return map(np.asarray, run(params[form], config, tokens_BxN, positions, mask))


def random_tokens(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, RAW["vocab_size"], shape).astype(np.int32)


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_logits_and_taps_agree_with_numpy(model, form):
    """Three rows, each with a mask and positions of its own."""
    config, params = model
    tokens = random_tokens(B, N)
    positions = np.stack([np.arange(N), np.arange(N) * 3 + 50, np.arange(N)[::-1]]).astype(np.int32)
    mask = np.stack([np.tri(N, dtype=bool), np.tri(N, dtype=bool), MASKED])
    logits, taps = run(params[form], config, tokens, positions, mask)
    for b in range(B):
        expected, entering = numpy_llama.forward(RAW, TENSORS, tokens[b], positions[b], mask[b])
        np.testing.assert_allclose(logits[b], expected, **CLOSE)
        taps_b = np.concatenate([entering[i] for i in TAPS], axis=-1)
        np.testing.assert_allclose(taps[b], taps_b, **CLOSE)
    assert not np.allclose(entering[0], entering[2]) and not np.allclose(entering[1], entering[2])


def test_gradients_flow_from_the_past_only(model):
    config, params = model
    params, T = params["scanned"], 10
    tokens = np.random.RandomState(1).permutation(RAW["vocab_size"])[:T].astype(np.int32)
    # Every token occurs once, so rows of embed are positions; default mask and positions.
    push = np.zeros((T, *params["embed"].shape), np.float32)
    push[np.arange(T), tokens] = np.random.RandomState(2).randn(config.hidden_size)

    @jax.jit
    @jax.vmap
    def derivative(push):
        hidden = lambda e: forward(params | {"embed": e}, config, tokens[None]).hidden_BxTxD  # noqa: E731
        return jax.jvp(hidden, (params["embed"],), (push,))[1]

    # influence[t, s]: how far row t moves when the embedding at position s is pushed
    influence_TxT = np.abs(derivative(push)[:, 0]).max(-1).T
    assert (influence_TxT[np.tri(T, dtype=bool)] > 0).all()
    assert (influence_TxT[~np.tri(T, dtype=bool)] == 0).all()
    np.testing.assert_array_equal(causal_mask(T)[0], np.tri(T, dtype=bool))


@pytest.mark.parametrize("form, rows", [("unrolled", B), ("scanned", B), ("unrolled", 1)])
def test_cached_decoding_equals_uncached(model, form, rows):
    """Ragged prefill, then chunks that commit 0 to 3 of their rows; the rest is junk."""
    config, params = model
    random = np.random.RandomState(3)
    tokens = random_tokens(B, N, seed=4)
    expected_logits, expected_taps = plain(model, tokens)
    cache = empty_cache(config, rows, SLOTS, stacked=form == "scanned")
    done = np.zeros(rows, int)
    sizes = [7, *[3] * 30]
    while sizes and (done < N).any():
        T = sizes.pop(0)
        count = np.minimum(random.randint(T == 7, T + 1, rows), N - done).astype(np.int32)
        chunk = random_tokens(rows, T, seed=len(sizes))
        for b in range(rows):
            chunk[b, : count[b]] = tokens[b, done[b] : done[b] + count[b]]
        mask = causal_cache_mask(cache.lengths_B, T, SLOTS)
        positions = cache.lengths_B[:, None] + jnp.arange(T, dtype=jnp.int32)
        logits, taps, cache = run_cached(params[form], config, chunk, positions, mask, cache)
        for b in range(rows):
            here = slice(done[b], done[b] + count[b])
            np.testing.assert_allclose(logits[b, : count[b]], expected_logits[b, here], **CLOSE)
            np.testing.assert_allclose(taps[b, : count[b]], expected_taps[b, here], **CLOSE)
        np.testing.assert_array_equal(cache.lengths_B, done)  # a forward commits nothing
        cache = cache.replace(lengths_B=cache.lengths_B + count)
        done += count
    assert (done == N).all() and len(set(map(int, cache.lengths_B))) == 1


def test_tree_rows_equal_plain_decoding_of_their_paths(model):
    """Three trees of nine rows behind prefixes of three lengths, one of them empty."""
    config, params = model
    trees = [
        paths([(0, 0, 0), (0, 0, 1), (0, 1), (1, 0), (2,)]),
        chain(8),
        paths([(i,) for i in range(8)]),
    ]
    T = trees[0].nodes
    assert [t.nodes for t in trees] == [T] * B
    assert sorted(trees[0].depth_T) == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    lengths = np.array([5, 7, 0], np.int32)
    prefix, drafted = random_tokens(B, 7, seed=6), random_tokens(B, T, seed=7)

    cache = empty_cache(config, B, SLOTS)
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (B, 7))
    mask = causal_cache_mask(cache.lengths_B, 7, SLOTS)
    *_, cache = run_cached(params["unrolled"], config, prefix, positions, mask, cache)
    cache = cache.replace(lengths_B=jnp.asarray(lengths))

    visible = jnp.stack([visible_from_parents(jnp.array(t.parents), t.max_depth) for t in trees])
    positions = jnp.asarray(lengths[:, None] + np.stack([t.depth_T for t in trees]))
    mask = tree_cache_mask(cache.lengths_B, visible, SLOTS)
    logits, taps, _ = run_cached(params["unrolled"], config, drafted, positions, mask, cache)

    for node in range(T):
        tokens, last = np.zeros((B, N), np.int32), []
        for b, tree in enumerate(trees):
            path = [node]
            while tree.parents[path[0]] >= 0:
                path.insert(0, tree.parents[path[0]])
            text = [*prefix[b, : lengths[b]], *drafted[b, path]]
            tokens[b, : len(text)] = text
            last.append(len(text) - 1)
        expected_logits, expected_taps = plain(model, tokens)
        np.testing.assert_allclose(logits[:, node], expected_logits[np.arange(B), last], **CLOSE)
        np.testing.assert_allclose(taps[:, node], expected_taps[np.arange(B), last], **CLOSE)


def test_scanned_layers_equal_unrolled_ones(model):
    """Logits and taps bit for bit up to rounding; the caches slot by slot."""
    config, params = model
    jax.tree.map(
        np.testing.assert_array_equal, unstack_layers(params["scanned"]), params["unrolled"]
    )
    tokens = random_tokens(B, N, seed=8)
    results = {form: list(plain(model, tokens, form)) for form in params}
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), *results.values())
    lengths = jnp.array([2, 0, 9], jnp.int32)
    caches = {}
    for form in params:
        cache = empty_cache(config, B, SLOTS, stacked=form == "scanned")
        cache = cache.replace(lengths_B=lengths)
        positions = lengths[:, None] + jnp.arange(3, dtype=jnp.int32)
        mask = causal_cache_mask(lengths, 3, SLOTS)
        *_, caches[form] = run_cached(params[form], config, tokens[:, :3], positions, mask, cache)
    for name in ("k", "v"):
        unrolled = np.stack(getattr(caches["unrolled"], name))
        np.testing.assert_allclose(unrolled, getattr(caches["scanned"], name), **CLOSE)
        written = np.abs(unrolled).max(axis=(0, 2, 4)) > 0  # B x S
        place = np.arange(SLOTS)
        start = np.asarray(lengths)[:, None]
        np.testing.assert_array_equal(written, (start <= place) & (place < start + 3))
    assert caches["scanned"].slots == caches["unrolled"].slots == SLOTS


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_the_last_tap_is_the_lm_head_s_input(model, form):
    config, params = model
    tokens, D = random_tokens(2, 4, seed=3), config.hidden_size
    out = forward(params[form], config, tokens, taps=(config.num_layers, 1))
    np.testing.assert_array_equal(out.taps_BxTxM[..., :D], out.hidden_BxTxD)
    below = forward(params[form], config, tokens, taps=(1,)).taps_BxTxM
    np.testing.assert_allclose(out.taps_BxTxM[..., D:], below, **CLOSE)


def test_rematerialisation_gives_the_same_gradients(model):
    config, params = model
    tokens = random_tokens(2, 8, seed=9)
    short = params["unrolled"] | {"layers": params["unrolled"]["layers"][:1]}

    def loss(params, remat):
        with recomputed_layers() if remat else nullcontext():
            out = forward(params, config, tokens, taps=(0,))
        logits = logits_of(params, out.hidden_BxTxD)
        return jax.nn.logsumexp(logits, axis=-1).mean() + (out.taps_BxTxM**2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    kept, recomputed = (gradient(short, remat) for remat in (False, True))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), kept, recomputed
    )
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(kept)) > 0.01
    for form in params:
        for remat in (False, True):
            text = str(jax.make_jaxpr(loss, static_argnums=1)(params[form], remat))
            assert ("remat" in text or "checkpoint" in text) == remat


def test_bfloat16_stays_near_float32(model):
    config, params = model
    tokens = random_tokens(B, N)
    expected, _ = plain(model, tokens, "scanned")
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params["scanned"])
    positions = np.broadcast_to(np.arange(N, dtype=np.int32), (B, N))
    mask = np.broadcast_to(np.tri(N, dtype=bool), (B, N, N))
    logits, taps = run(half, config, tokens, positions, mask)
    assert logits.dtype == jnp.float32 and taps.dtype == jnp.bfloat16
    assert np.corrcoef(np.asarray(logits).ravel(), expected.ravel())[0, 1] > 0.99


def test_errors(model):
    config, params = model
    tokens = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="mask"):
        forward(params["unrolled"], config, tokens, cache=empty_cache(config, 1, 8))
    for form in params:
        for tap in (4, -1):
            with pytest.raises(ValueError, match=f"taps.*{tap}"):
                forward(params[form], config, tokens, taps=(0, tap))
