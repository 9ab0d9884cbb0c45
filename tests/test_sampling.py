"""The one filter and the one sampler, against sorting and prefix sums in float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import filtered
from scipy.stats import chisquare

from specjax.sampling import (
    Sampling,
    argmax,
    categorical,
    draw,
    filtered_probs,
    top_candidates,
    top_ids,
)

V = 61
SETTINGS = [
    Sampling(temperature, top_k, top_p)
    for temperature, top_k, top_p in itertools.product(
        (0.3, 1.0, 1.7), (0, 1, 7, V + 5), (1.0, 0.9, 0.4)
    )
    if (top_k, top_p) != (1, 0.9)
] + [Sampling(1.0, V), Sampling(1.0, 0, 1e-6), Sampling(0.7, 20, 0.999)]


# uniforms x laws -> tokens [laws, uniforms]
sample = jax.jit(jax.vmap(jax.vmap(categorical, (0, None)), (None, 0)))
probs_of = jax.jit(filtered_probs, static_argnums=1)


def logit_rows():
    """Flat, sharp, tied, masked and signed-zero rows."""
    random = np.random.RandomState(0)
    rows = [scale * random.randn(V) for scale in (0.01, 1, 1, 3, 3, 10, 30)]
    rows += [np.round(2 * random.randn(V)) / 2 for _ in range(8)]  # many ties
    rows += [np.zeros(V), np.where(np.arange(V) % 2, 0.0, -0.0), np.full(V, -7.0)]
    rows += [np.where(random.rand(V) < 0.5, -np.inf, random.randn(V)) for _ in range(3)]
    rows += [np.where(np.arange(V) == V - 1, 1.0, -np.inf), 1e4 * random.randn(V)]
    rows += [np.abs(random.randn(V)), -np.abs(random.randn(V)), np.linspace(-4, 4, V)]
    return np.array(rows, np.float32)


def boundary_margin(logits, sampling):
    """How far the cumulative mass stays from top_p: nearer than rounding, either set is right."""
    ordered = np.sort(filtered(logits, Sampling(sampling.temperature, sampling.top_k)))[::-1]
    return np.abs(np.cumsum(ordered) - sampling.top_p).min()


def test_filter_equals_sorting():
    rows = logit_rows()
    everything = jax.jit(
        lambda rows: [jax.vmap(lambda r, s=s: filtered_probs(r, s))(rows) for s in SETTINGS]
    )
    skipped = 0
    for sampling, probs in zip(SETTINGS, everything(rows), strict=True):
        assert probs.dtype == jnp.float32
        for row, actual in zip(rows, np.asarray(probs), strict=True):
            if sampling.top_p < 1 and boundary_margin(row, sampling) < 1e-5:
                skipped += 1
                continue
            expected = filtered(row, sampling)
            np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-7, err_msg=sampling)
            cut = expected == 0  # exactly zero, not merely small
            np.testing.assert_array_equal(actual[cut], 0.0)
    assert skipped < 0.05 * len(rows) * len(SETTINGS)


def test_ties_with_the_last_token_kept_are_kept():
    logits = jnp.array([2.0, 1.0, 1.0, 1.0, 0.0])
    kept = lambda **s: np.flatnonzero(probs_of(logits, Sampling(1.0, **s))).tolist()  # noqa: E731
    assert kept(top_k=1) == [0]
    assert kept(top_k=2) == kept(top_k=4) == [0, 1, 2, 3]
    assert kept(top_p=0.5) == [0, 1, 2, 3]  # the most probable has 0.45, any tied one reaches 0.5


def test_the_order_is_temperature_then_top_k_then_top_p():
    """Law (0.4, 0.3, 0.2, 0.1): each wrong order keeps other tokens or weighs them otherwise."""
    law = np.array([0.4, 0.3, 0.2, 0.1])
    got = lambda *s: np.asarray(probs_of(jnp.log(jnp.array(law)), Sampling(*s)))  # noqa: E731
    # top-k before top-p: of the two tokens left, the first alone has mass 0.57 >= 0.5. The other
    # way round, 0.5 of the whole mass takes two tokens.
    np.testing.assert_allclose(got(1.0, 2, 0.5), [1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(got(1.0, 0, 0.5), [4 / 7, 3 / 7, 0, 0], atol=1e-6)
    # Temperature before top-p: squared, the law is (16, 9, 4, 1) / 30 and two tokens hold 0.8 of
    # it. The other way round it takes three tokens, squared afterwards.
    np.testing.assert_allclose(got(0.5, 0, 0.8), [16 / 25, 9 / 25, 0, 0], atol=1e-6)
    np.testing.assert_allclose(got(1.0, 0, 0.8), [4 / 9, 3 / 9, 2 / 9, 0], atol=1e-6)
    # All three at once; top-p looks at what top-k left, renormalised: 16 / 29 + 9 / 29 < 0.9.
    np.testing.assert_allclose(got(0.5, 3, 0.9), [16 / 29, 9 / 29, 4 / 29, 0], atol=1e-6)
    np.testing.assert_allclose(got(0.5, 3, 0.85), [16 / 25, 9 / 25, 0, 0], atol=1e-6)


def test_greedy_is_a_point_mass_on_the_first_maximum():
    rows = logit_rows()
    greedy = Sampling()
    assert greedy.greedy and not Sampling(1.0).greedy
    probs = probs_of(jnp.asarray(rows), greedy)
    np.testing.assert_array_equal(probs, np.eye(V, dtype=np.float32)[rows.argmax(-1)])
    tokens = draw(None, jnp.asarray(rows), greedy)
    np.testing.assert_array_equal(tokens, rows.argmax(-1))
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_argmax_is_the_first_maximum(axis):
    x = np.random.RandomState(1).randint(0, 4, (5, 6, 7)).astype(np.float32)
    x[0, 0] = -np.inf
    actual = argmax(jnp.asarray(x), axis)
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, x.argmax(axis))


def test_top_candidates_are_the_first_of_the_largest():
    scores = np.random.RandomState(2).randint(0, 4, (3, 20, 9)).astype(np.float32)
    values, indices = jax.jit(top_candidates, static_argnums=1)(jnp.asarray(scores), 5)
    expected = np.argsort(-scores, axis=-1, kind="stable")[..., :5]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, -1))
    assert indices.dtype == jnp.int32


@pytest.mark.parametrize("size, count", [(9, 5), (64, 64), (700, 8), (1000, 3), (640, 10)])
def test_top_ids_are_the_first_of_the_largest(size, count):
    """Within one block and over several, the last one padded; ties everywhere, and -inf."""
    random = np.random.RandomState(size)
    few = random.randint(0, 4, (2, 10, size)).astype(np.float32)
    many = np.sort(random.randn(1, 10, size).astype(np.float32))[..., :: random.choice([-1, 1])]
    sparse = np.where(random.rand(1, 10, size) < 0.01, 1.0, -np.inf).astype(np.float32)
    scores = np.concatenate([few, many, sparse, np.zeros_like(sparse)])
    indices = jax.jit(top_ids, static_argnums=1)(jnp.asarray(scores), count)
    expected = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    np.testing.assert_array_equal(indices, expected)
    assert indices.dtype == jnp.int32


def laws_of(size, random):
    """Dense, sparse, edged with zeros, and concentrated laws, float32."""
    dense = random.dirichlet(np.ones(size), 4)
    sparse = random.dirichlet(np.full(size, 0.3), 4) * (random.rand(4, size) < 0.5)
    middle = np.where(np.abs(np.arange(size) - size // 2) <= size // 4, dense, 0)
    points = np.eye(size)[[0, size // 2, size - 1]]
    rows = np.concatenate([dense, sparse, middle, points, 0.3 * dense[:1]])  # the last sums to 0.3
    return rows[rows.sum(-1) > 0].astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 5, 61, 1000])
def test_categorical_inverts_the_cumulative_mass(size):
    random = np.random.RandomState(size)
    laws = laws_of(size, random)
    uniform = np.concatenate(
        [random.rand(300), [0, 1e-30, 1e-7, 0.5, 1 - 2**-24, 1 - 2**-23]]
    ).astype(np.float32)
    tokens = np.asarray(sample(uniform, laws))
    assert tokens.dtype == np.int32
    for law, row in zip(laws.astype(np.float64), tokens, strict=True):
        assert ((0 <= row) & (row < size)).all()
        assert (law[row] > 0).all(), "a token of probability zero"
        # token = the first whose cumulative mass passes the uniform, up to rounding
        high = np.cumsum(law)[row] / law.sum()
        low = high - law[row] / law.sum()
        assert (low - 1e-6 <= uniform).all() and (uniform <= high + 1e-6).all()
    exact = laws.astype(np.float64)[0]
    inside = np.searchsorted(np.cumsum(exact), uniform * exact.sum(), side="right")
    assert (tokens[0] == np.minimum(inside, size - 1)).mean() > 0.99


def test_uniforms_at_both_ends_find_tokens_with_mass():
    """Zeros before, behind and between, at every size around a power of two."""
    ends = jnp.array([0.0, 1 - 2**-24], jnp.float32)
    for size in (7, 16, 17):
        laws = np.zeros((3, size), np.float32)
        laws[0, [2, size - 3]] = 0.25, 0.75
        laws[1, 2:4] = 0.5
        laws[2, size - 4 : size - 2] = np.float32(1e-20), np.float32(1)
        tokens = sample(ends, laws)
        first, last = 2, size - 3
        assert tokens.tolist() == [[first, last], [2, 3], [size - 4, size - 3]]


def test_draws_follow_the_filtered_law():
    logits = jnp.asarray(2 * np.random.RandomState(3).randn(V), jnp.float32)
    settings = (Sampling(1.3), Sampling(0.8, 12, 0.95))
    keys = jax.random.split(jax.random.key(0), 20_000)

    @jax.jit
    def tokens(keys):
        return [jax.vmap(lambda k, s=s: draw(k, logits, s))(keys) for s in settings]

    for sampling, drawn in zip(settings, tokens(keys), strict=True):
        assert drawn.dtype == jnp.int32
        law = filtered(np.asarray(logits), sampling)
        count = np.bincount(drawn, minlength=V)
        assert (count[law == 0] == 0).all()
        common = law * len(keys) >= 5
        observed = np.append(count[common], count[~common].sum())
        expected = np.append(law[common], law[~common].sum()) * len(keys)
        keep = expected > 0
        assert chisquare(observed[keep], expected[keep]).pvalue > 0.01


@pytest.mark.parametrize(
    "field, values",
    [
        ("temperature", [-0.1, float("nan"), float("inf"), 1e-40]),
        ("top_k", [-1, 2.5]),
        ("top_p", [0.0, -0.5, 1.01, float("nan")]),
    ],
)
def test_errors_name_the_field(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{field}: "):
            Sampling(**{field: value})


@pytest.mark.parametrize("temperature", [1e-30, 1e-10, 1e-6])
def test_low_temperatures_neither_overflow_nor_blur(temperature):
    logits = jnp.array([-300.0, 200.0, 199.99, 0.0, 200.0])
    probs = probs_of(logits, Sampling(temperature))
    np.testing.assert_array_equal(probs, [0, 0.5, 0, 0, 0.5])


def test_greedy_has_no_filters():
    """Settings that decode alike are one setting, so that they are one compiled program."""
    for top_k, top_p in ((5, 1.0), (0, 0.9), (5, 0.9)):
        assert Sampling(0.0, top_k, top_p) == Sampling(), "a second program for the same tokens"
        kept = Sampling(1.0, np.int64(top_k), top_p)
        assert (kept.top_k, kept.top_p) == (top_k, top_p) and type(kept.top_k) is int
