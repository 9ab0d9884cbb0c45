"""Pieces of layer-wise supervision: label-aligned masks, plain losses, chunks of rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def shift(x_BxT, offset: int):
    """x[:, t + offset] at t, zeros where that runs off the end. Trailing axes are kept."""
    padding = [(0, 0), (0, offset)] + [(0, 0)] * (x_BxT.ndim - 2)
    return jnp.pad(x_BxT[:, offset:], padding)


def label_mask(supervised_BxT, depths: int, segments_BxT=None):
    """bool BxTxN: whether depth i's label, token x_{t+1+i}, exists and is supervised.

    Where rows hold several texts, `segments_BxT` says whose each token is: a text has no labels in
    the next one.

    The mask follows the label, not the row: row t at depth i counts by token t+1+i. (Leaving it
    unshifted is the commonest bug in released trainers.)
    """
    labelled = [shift(supervised_BxT, 1 + i) for i in range(1, depths + 1)]
    if segments_BxT is not None:
        own = (shift(segments_BxT, 1 + i) == segments_BxT for i in range(1, depths + 1))
        labelled = [a & b for a, b in zip(labelled, own, strict=True)]
    return jnp.stack(labelled, axis=-1)


def cross_entropy(teacher_probs, student_logits):
    """-sum_v p(v) log q(v) over the last axis, in nats: forward KL plus the teacher's entropy.

    As p sums to one it is logsumexp(student) - p . student, whose gradient is q - p: one
    exponential in all, where a log-softmax of each side would take several passes.
    """
    teacher_probs = jax.lax.stop_gradient(teacher_probs)
    student_logits = student_logits.astype(jnp.float32)
    chosen = jnp.sum(teacher_probs * student_logits, axis=-1)
    return jax.nn.logsumexp(student_logits, axis=-1) - chosen


def hard_cross_entropy(labels, student_logits):
    """-log q(label) in nats; 0 where there is no label (-1)."""
    nats = optax.softmax_cross_entropy_with_integer_labels(
        student_logits.astype(jnp.float32), jnp.maximum(labels, 0)
    )
    return jnp.where(labels >= 0, nats, 0.0)


def smooth_l1(student, teacher):
    """Mean over the last axis of the Huber loss with threshold 1."""
    teacher = jax.lax.stop_gradient(teacher)
    return jnp.mean(optax.losses.huber_loss(student, teacher, delta=1.0), axis=-1)


def depth_weights(depths: int, decay: float):
    """decay^(i-1) for depth i."""
    return decay ** jnp.arange(depths, dtype=jnp.float32)


def by_chunks(rows_fn: Callable, length: int, chunk: int):
    """`rows_fn(start, size)` over the rows 0..length, joined along axis 1.

    Without chunks (0) the rows are one piece and nothing is recomputed. With them, each chunk is
    rematerialised in the backward pass, so that full-vocabulary logits exist for `chunk` rows only.
    Rows past the last whole chunk are a smaller one, a second program to compile.
    """
    if not chunk or chunk >= length:
        return rows_fn(0, length)
    whole = length - length % chunk
    pieces = jax.lax.map(
        jax.checkpoint(lambda start: rows_fn(start, chunk)), jnp.arange(0, whole, chunk)
    )
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], whole, *x.shape[3:])  # noqa: E731
    rows = jax.tree.map(join, pieces)
    if whole == length:
        return rows
    rest = jax.checkpoint(lambda start: rows_fn(start, length - whole))(whole)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), rows, rest)
