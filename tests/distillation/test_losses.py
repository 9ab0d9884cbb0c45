"""Losses against closed forms and slow loops."""

import jax
import jax.numpy as jnp
import numpy as np

from specjax.distillation import losses


def test_label_masks_follow_the_label_token():
    rng = np.random.default_rng(0)
    supervised = rng.random((3, 9)) < 0.6
    mask = np.asarray(losses.label_mask(jnp.asarray(supervised), 4))
    for b in range(3):
        for t in range(9):
            for i in range(1, 5):
                label = t + 1 + i
                expected = label < 9 and supervised[b, label]
                assert mask[b, t, i - 1] == expected


def test_boundary_of_a_supervised_span():
    # Tokens 3.. are the answer. Depth 1 of row 1 drafts token 3, the first supervised one.
    supervised = jnp.asarray([[0, 0, 0, 1, 1, 1]], bool)
    mask = np.asarray(losses.label_mask(supervised, 2))[0]
    assert mask[:, 0].tolist() == [0, 1, 1, 1, 0, 0]
    assert mask[:, 1].tolist() == [1, 1, 1, 0, 0, 0]


def test_cross_entropy_gradient_is_student_minus_teacher():
    keys = jax.random.split(jax.random.key(0), 2)
    teacher, student = (3 * jax.random.normal(k, (5, 11)) for k in keys)
    grad = jax.grad(lambda s: losses.cross_entropy(jax.nn.softmax(teacher), s).sum())(student)
    expected = jax.nn.softmax(student) - jax.nn.softmax(teacher)
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_teachers_get_no_gradient():
    x = jax.random.normal(jax.random.key(1), (4, 7))
    for loss in (losses.cross_entropy, lambda t, s: losses.smooth_l1(s, t)):
        assert not np.any(jax.grad(lambda t: loss(t, 2 * x).sum())(x))  # noqa: B023


def test_cross_entropy_survives_bfloat16_extremes():
    logits = jnp.asarray([[1e4, -1e4, 0.0]], jnp.bfloat16)
    assert np.isfinite(losses.cross_entropy(jax.nn.softmax(logits), -logits)).all()


def test_chunks_change_nothing():
    x = jax.random.normal(jax.random.key(2), (2, 12, 3))

    def total(x, chunk):
        cubes = lambda s, n: {"cube": jax.lax.dynamic_slice_in_dim(x, s, n, 1) ** 3}  # noqa: E731
        rows = losses.by_chunks(cubes, 12, chunk)["cube"]
        return jnp.sum(rows * jnp.arange(12)[:, None])  # in order

    whole = jax.value_and_grad(total)(x, 0)
    for chunk in (1, 3, 4, 5, 11, 12, 100):  # 5 and 11 leave a smaller piece
        for a, b in zip(whole, jax.value_and_grad(total)(x, chunk), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_hard_cross_entropy_is_the_one_of_a_one_hot_teacher():
    student = jax.random.normal(jax.random.key(3), (5, 11))
    labels = jnp.asarray([0, 10, -1, 4, 4])
    expected = losses.cross_entropy(jax.nn.one_hot(labels, 11), student) * (labels >= 0)
    np.testing.assert_allclose(losses.hard_cross_entropy(labels, student), expected, rtol=1e-6)
