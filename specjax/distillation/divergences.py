"""Divergences between teacher p and student q, one number a position, in nats.

All take logits over the last axis (float32 or bfloat16; computed in float32), p and q being their
softmaxes at `temperature`, a static float. No factor temperature^2 is applied: a caller who wants
gradients of the size they have at temperature 1 multiplies by it. The teacher gets no gradient and
may hold -inf (probability zero); the student's logits must be finite.

Sources: DistillSpec 2310.08461 for the choice; Jensen-Shannon as in GKD 2306.13649; skewed KL from
DistiLLM 2402.03898.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Stands for log 0: its exponential is zero, and unlike -inf it may be multiplied by zero.
LOG_ZERO = -1e5


def _scaled(logits, temperature: float):
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be positive")
    return logits.astype(jnp.float32) / temperature


def _log_probs(logits, temperature: float):
    return jnp.maximum(jax.nn.log_softmax(_scaled(logits, temperature)), LOG_ZERO)


def forward_kl(teacher_logits, student_logits, temperature: float = 1.0):
    """KL(p || q). [..., V], [..., V] -> [...].

    As p sums to one it is logsumexp(student) - p . student - H(p): one exponential over the
    student, and the gradient in its (scaled) logits is q - p.
    """
    log_p = _log_probs(jax.lax.stop_gradient(teacher_logits), temperature)
    student = _scaled(student_logits, temperature)
    # Centred first, or two large terms would cancel.
    student -= jax.lax.stop_gradient(jnp.max(student, axis=-1, keepdims=True))
    p = jnp.exp(log_p)
    return jnp.log(jnp.sum(jnp.exp(student), axis=-1)) + jnp.sum(p * (log_p - student), axis=-1)


def reverse_kl(teacher_logits, student_logits, temperature: float = 1.0):
    """KL(q || p). [..., V], [..., V] -> [...].

    Where p is zero it is infinite by definition; here log p is LOG_ZERO, so that the loss is huge,
    its gradient finite.
    """
    log_p = _log_probs(jax.lax.stop_gradient(teacher_logits), temperature)
    log_q = _log_probs(student_logits, temperature)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def jensen_shannon(teacher_logits, student_logits, temperature: float = 1.0, *, beta: float = 0.5):
    """b KL(p || m) + (1-b) KL(q || m) with m = b p + (1-b) q. [..., V], [..., V] -> [...].

    Divided by b it tends to the forward KL as b -> 0, divided by 1-b to the reverse KL as b -> 1.

    Raises:
      ValueError: beta is not inside (0, 1); at both ends the divergence is zero.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"jensen_shannon: beta {beta} must be inside (0, 1); for the ends' directions use "
            "forward_kl (0) or reverse_kl (1)"
        )
    log_p = _log_probs(jax.lax.stop_gradient(teacher_logits), temperature)
    log_q = _log_probs(student_logits, temperature)
    log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
    from_p = jnp.sum(jnp.exp(log_p) * (log_p - log_m), axis=-1)
    from_q = jnp.sum(jnp.exp(log_q) * (log_q - log_m), axis=-1)
    return beta * from_p + (1 - beta) * from_q


def skewed_kl(teacher_logits, student_logits, temperature: float = 1.0, *, alpha: float = 0.1):
    """KL(p || a p + (1-a) q). [..., V], [..., V] -> [...].

    Between 0 and -log a, however far q is off, where the forward KL (alpha 0) has no bound.

    Raises:
      ValueError: alpha is not in [0, 1); at 1 the divergence is zero.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"skewed_kl: alpha {alpha} must be in [0, 1)")
    log_p = _log_probs(jax.lax.stop_gradient(teacher_logits), temperature)
    log_mix = _log_probs(student_logits, temperature) + jnp.log1p(-alpha)
    if alpha:
        log_mix = jnp.logaddexp(log_p + jnp.log(alpha), log_mix)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_mix), axis=-1)


def total_variation(teacher_logits, student_logits, temperature: float = 1.0):
    """Half the L1 distance of p and q; 1 - it is the acceptance rate. [..., V], [..., V] -> [...].

    Its gradient vanishes with q: slow from a cold start.
    """
    teacher = jax.lax.stop_gradient(teacher_logits)
    p, q = (jax.nn.softmax(_scaled(x, temperature)) for x in (teacher, student_logits))
    return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)


DIVERGENCES: dict[str, Callable] = {
    f.__name__: f for f in (forward_kl, reverse_kl, jensen_shannon, skewed_kl, total_variation)
}


def get_divergence(name: str, **parameters) -> Callable:
    """A divergence by name, its parameters (temperature, beta, alpha) bound.

    Raises:
      ValueError: unknown name (lists the known ones), unknown parameter, value out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"divergence: {name!r} is unknown; one of {tuple(DIVERGENCES)}")
    bound = functools.partial(DIVERGENCES[name], **parameters)
    logits = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        jax.eval_shape(bound, logits, logits)  # so that parameters are refused here, not at a step
    except TypeError as error:
        raise ValueError(f"divergence {name!r}: {error}") from error
    return bound
