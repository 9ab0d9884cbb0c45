"""Divergences against float64 definitions, closed-form gradients and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.distillation import divergences
from specjax.distillation.divergences import (
    DIVERGENCES,
    forward_kl,
    get_divergence,
    jensen_shannon,
    reverse_kl,
    skewed_kl,
    total_variation,
)

ROWS, V = 40, 11
ALL = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


def random_logits(seed, scale=2.0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return tuple(scale * jax.random.normal(k, (ROWS, V)) for k in keys)


def probs(logits, temperature=1.0):
    """Softmax in float64 NumPy."""
    x = np.asarray(logits, np.float64) / temperature
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl(p, q):
    ratio = np.log(np.where(p > 0, p, 1)) - np.log(np.where(p > 0, q, 1))
    return (p * ratio).sum(-1)


def definition(divergence, p, q, beta=0.5, alpha=0.1):
    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skewed_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "total_variation": lambda: 0.5 * np.abs(p - q).sum(-1),
    }[divergence.__name__]()


def gradient(divergence, teacher, student):
    return jax.grad(lambda s: divergence(teacher, s).sum())(student)


@ALL
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_equals_its_definition_at_every_temperature(divergence, temperature):
    teacher, student = random_logits(0)
    expected = definition(divergence, probs(teacher, temperature), probs(student, temperature))
    got = divergence(teacher, student, temperature)
    assert got.shape == (ROWS,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.9])
def test_jensen_shannon_equals_its_definition_at_every_beta(beta):
    teacher, student = random_logits(1)
    expected = definition(jensen_shannon, probs(teacher), probs(student), beta)
    np.testing.assert_allclose(jensen_shannon(teacher, student, beta=beta), expected, atol=2e-6)


@pytest.mark.parametrize("alpha", [0.02, 0.5, 0.9])
def test_skewed_kl_at_every_alpha(alpha):
    for scale in (2.0, 100.0):  # of the second, the forward KL is past any bound
        teacher, student = random_logits(13, scale)
        p, q = probs(teacher), probs(student)
        got = skewed_kl(teacher, student, alpha=alpha)
        np.testing.assert_allclose(got, definition(skewed_kl, p, q, alpha=alpha), atol=5e-6)
        assert np.all(got <= -np.log(alpha) + 1e-5)
    assert np.any(forward_kl(teacher, student) > 10) and np.max(got) > -0.5 * np.log(alpha)
    np.testing.assert_allclose(
        skewed_kl(teacher, student, alpha=0), forward_kl(teacher, student), rtol=1e-5, atol=1e-4
    )


def test_closed_form_gradients():
    teacher, student = random_logits(2)
    p, q = probs(teacher), probs(student)
    ahead = (p > q).astype(float)
    mean = lambda x: (q * x).sum(-1, keepdims=True)  # noqa: E731
    surprise = np.log(q / p)
    share = p / (0.1 * p + 0.9 * q)
    for divergence, expected in {
        forward_kl: q - p,
        reverse_kl: q * (surprise - mean(surprise)),
        skewed_kl: -0.9 * q * (share - mean(share)),
        total_variation: -q * (ahead - mean(ahead)),
    }.items():
        got = gradient(divergence, teacher, student)
        np.testing.assert_allclose(got, expected, atol=2e-6, err_msg=divergence.__name__)
    assert np.abs(gradient(total_variation, teacher, student)).max() <= 0.25 + 1e-6


@ALL
def test_temperature_scales_the_gradient_once_not_by_its_square(divergence):
    teacher, student = random_logits(3)
    at_three = gradient(functools.partial(divergence, temperature=3.0), 3 * teacher, 3 * student)
    np.testing.assert_allclose(3 * at_three, gradient(divergence, teacher, student), atol=2e-6)


@ALL
def test_zero_with_zero_gradient_only_when_equal_up_to_a_constant(divergence):
    teacher, student = random_logits(4)
    constant = jnp.linspace(-50, 50, ROWS)[:, None]
    np.testing.assert_allclose(divergence(teacher, teacher + constant), 0, atol=2e-5)
    np.testing.assert_allclose(gradient(divergence, teacher, teacher), 0, atol=1e-6)
    assert np.all(divergence(teacher, student) > 1e-3)


@ALL
def test_constants_change_nothing(divergence):
    teacher, student = random_logits(5)
    plain = divergence(teacher, student)
    np.testing.assert_allclose(divergence(teacher + 7, student - 9), plain, atol=2e-5)
    # Whole numbers, so that even a large constant costs the logits themselves no precision.
    teacher, student = jnp.round(teacher), jnp.round(student)
    plain = divergence(teacher, student)
    np.testing.assert_allclose(divergence(teacher - 1e5, student + 1e5), plain, atol=2e-6)


@ALL
def test_the_teacher_gets_no_gradient(divergence):
    teacher, student = random_logits(6)
    assert not np.any(jax.grad(lambda t: divergence(t, student).sum())(teacher))
    assert np.any(gradient(divergence, teacher, student))


@ALL
def test_bfloat16_extremes_are_finite(divergence):
    rng = np.random.default_rng(7)
    teacher, student = (
        jnp.asarray(rng.choice([-1e4, 0.0, 1.0, 1e4], (ROWS, V)), jnp.bfloat16) for _ in range(2)
    )
    with_zeros = jnp.where(jnp.arange(V) < 4, -jnp.inf, teacher)
    for t in (teacher, with_zeros):
        got = divergence(t, student)
        assert got.dtype == jnp.float32 and np.isfinite(got).all() and np.all(got > -1e-5)
        assert np.isfinite(gradient(divergence, t, student).astype(jnp.float32)).all()


def test_minus_infinity_in_the_teacher_is_probability_zero():
    teacher, student = random_logits(8)
    masked = jnp.where(jnp.arange(V) < 4, -jnp.inf, teacher)
    p, q = probs(masked), probs(student)
    for divergence in (forward_kl, jensen_shannon, skewed_kl, total_variation):
        np.testing.assert_allclose(
            divergence(masked, student), definition(divergence, p, q), atol=2e-6
        )
    # The reverse KL is infinite there by definition: instead, a bounded cost for each stray mass.
    stray = q[:, :4].sum(-1)
    got = reverse_kl(masked, student)
    np.testing.assert_allclose(got, -divergences.LOG_ZERO * stray, rtol=1e-2)
    grad = gradient(reverse_kl, masked, student)
    assert np.isfinite(grad).all() and np.all(grad[:, :4].sum(-1) > 0)


def test_jensen_shannon_is_symmetric_and_bounded_at_one_half():
    for scale in (0.1, 2.0, 100.0):
        teacher, student = random_logits(9, scale)
        one, other = jensen_shannon(teacher, student), jensen_shannon(student, teacher)
        np.testing.assert_allclose(one, other, atol=1e-6)
        assert np.all(one <= np.log(2) + 1e-6) and np.all(one >= -1e-6)
    for beta in (0.2, 0.7):
        one = jensen_shannon(teacher, student, beta=beta)
        np.testing.assert_allclose(
            one, jensen_shannon(student, teacher, beta=1 - beta), rtol=1e-5, atol=1e-6
        )


def test_jensen_shannon_tends_to_both_kls():
    teacher, student = random_logits(10, 1.0)
    small = 1e-3
    np.testing.assert_allclose(
        jensen_shannon(teacher, student, beta=small) / small,
        forward_kl(teacher, student),
        rtol=0.03,
    )
    np.testing.assert_allclose(
        jensen_shannon(teacher, student, beta=1 - small) / small,
        reverse_kl(teacher, student),
        rtol=0.03,
    )


def test_pinsker_and_the_acceptance_rate():
    for scale in (0.3, 2.0, 20.0):
        teacher, student = random_logits(11, scale)
        tvd = np.asarray(total_variation(teacher, student))
        for divergence in (forward_kl, reverse_kl):
            assert np.all(tvd**2 <= divergence(teacher, student) / 2 + 1e-6)
        overlap = np.minimum(probs(teacher), probs(student)).sum(-1)
        np.testing.assert_allclose(overlap, 1 - tvd, atol=2e-6)


def test_by_name_with_parameters_bound():
    teacher, student = random_logits(12)
    for name, divergence in DIVERGENCES.items():
        np.testing.assert_array_equal(
            get_divergence(name)(teacher, student), divergence(teacher, student)
        )
    bound = get_divergence("jensen_shannon", beta=0.2, temperature=2.0)
    np.testing.assert_array_equal(
        bound(teacher, student), jensen_shannon(teacher, student, 2.0, beta=0.2)
    )


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("kl", {}, "'kl' is unknown.*forward_kl.*total_variation"),
        ("forward_kl", {"beta": 0.5}, "forward_kl.*beta"),
        ("jensen_shannon", {"bta": 0.5}, "jensen_shannon.*bta"),
        ("jensen_shannon", {"beta": 0}, "beta 0 "),
        ("jensen_shannon", {"beta": 1.0}, "beta 1.0 "),
        ("jensen_shannon", {"beta": float("nan")}, "beta nan "),
        ("skewed_kl", {"beta": 0.5}, "skewed_kl.*beta"),
        ("skewed_kl", {"alpha": 1.0}, "alpha 1.0 "),
        ("skewed_kl", {"alpha": -0.1}, "alpha -0.1 "),
        ("skewed_kl", {"alpha": float("nan")}, "alpha nan "),
        ("reverse_kl", {"temperature": 0.0}, "temperature: 0.0"),
        ("total_variation", {"temperature": -1.0}, "temperature: -1.0"),
    ],
)
def test_bad_choices_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        get_divergence(name, **parameters)
