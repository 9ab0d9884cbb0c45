"""DeepKD (arXiv 2505.15133): distillation split into three streams, each with its own momentum.

The streams are the task-oriented loss (tog: cross-entropy of the label), the target-class one
(tcg: "the label or not") and the non-target-class one (ncg: which of the other tokens). A trainer
takes the gradient of each (`stream_gradients`) and hands the dict {"tog", "tcg", "ncg"} of trees to
an optimiser that begins with `deepkd_trace` or `scale_by_deepkd_adam`, which make one tree of it;
only `clip_streams_by_global_norm` and `gsnr.probe_gsnr` may stand before those.

The published rule is the default. Of what the released code does otherwise, `compat="released"`
reproduces the momentum of the tog stream. Not reproduced: (1 - p_y) * NCKD as a product of two
batch means (a loss per position has no batch); weight decay on the tcg stream, taken at parameters
that the other two streams have moved already; top-k over all classes, with the label dropped after.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

STREAMS = ("tog", "tcg", "ncg")
DELTAS = (0.075, -0.075, 0.075)


def _momenta(mu: float, deltas) -> dict[str, float]:
    """Each stream's momentum, mu + delta."""
    if len(deltas) != len(STREAMS):
        raise ValueError(f"deltas: {deltas} must be one number for each of {STREAMS}")
    if not all(0 <= mu + delta < 1 for delta in deltas):
        raise ValueError(f"deltas: {deltas} must keep {mu} + delta in [0, 1)")
    return {stream: mu + delta for stream, delta in zip(STREAMS, deltas, strict=True)}


@dataclasses.dataclass(frozen=True)
class DeepKD:
    """Hyper-parameters, those of the released configs by default.

    Attributes:
      mode: "kd" weighs NCKD by the teacher's 1 - p_y; "dkd" by a constant, which keeps it alive
        where the teacher is sure of the label, as language models mostly are.
      mu: momentum that the deltas are added to.
      deltas: of tog, tcg and ncg. 0.05 is usual for ncg in dkd mode.
      ce_weight: of the hard cross-entropy; released: 0.1 in kd mode, 1 in dkd mode.
      temperature: of TCKD and NCKD; released: 4 on CIFAR, 1 on ImageNet.
      alpha, beta: weights of TCKD and NCKD in dkd mode.
      warmup_steps: steps over which dkd mode brings TCKD and NCKD in; 0 is off.
      k_opt: classes that the dynamic top-k mask keeps in its middle phase; None is off.
      steps: length of the run, which the mask's schedule needs.
      easy_end, hard_start: the ends of that schedule's first two phases, as fractions of the run.
        The paper's are not known; thirds are ours.
      weights: factors of the three streams; with equal momenta and `gains` it is the control that
        tells momenta from the reweighing they bring.
      normalised: streams as moving averages, which do not reweigh each other (ours); False is the
        published heavy ball.
      probe: measure each stream's signal-to-noise ratio over the run (twice the streams' memory).

    Raises:
      ValueError: a field is out of range.
    """

    mode: str = "kd"
    mu: float = 0.9
    deltas: tuple[float, float, float] = DELTAS
    ce_weight: float = 0.1
    temperature: float = 1.0
    alpha: float = 1.0
    beta: float = 8.0
    warmup_steps: int = 0
    k_opt: int | None = None
    steps: int = 0
    easy_end: float = 1 / 3
    hard_start: float = 2 / 3
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    normalised: bool = True
    probe: bool = False

    def __post_init__(self):
        if self.mode not in ("kd", "dkd"):
            raise ValueError(f"mode: {self.mode!r} is unknown; one of 'kd', 'dkd'")
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu: {self.mu} must be in [0, 1)")
        _momenta(self.mu, self.deltas)
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} must be > 0")
        for name in ("ce_weight", "alpha", "beta", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be >= 0")
        if self.k_opt is not None:
            if self.k_opt < 1:
                raise ValueError(f"k_opt: {self.k_opt} must be >= 1, or None for no mask")
            if self.steps < 1:
                raise ValueError(f"steps: {self.steps} must be >= 1 for the top-k schedule")
        if len(self.weights) != len(STREAMS) or min(self.weights) < 0:
            raise ValueError(f"weights: {self.weights} must be numbers >= 0 for {STREAMS}")
        if not 0 < self.easy_end < 1:
            raise ValueError(f"easy_end: {self.easy_end} must be in (0, 1)")
        if not self.easy_end <= self.hard_start < 1:
            raise ValueError(f"hard_start: {self.hard_start} must be in [easy_end, 1)")


# Losses


def top_k_schedule(step, steps: int, classes: int, k_opt: int, easy_end=1 / 3, hard_start=2 / 3):
    """K, an int32 scalar: non-target classes that NCKD looks at. `step` may be traced.

    From a twentieth of the classes linearly to `k_opt`, there until `hard_start`, then linearly to
    all of them but the label, reached at `step == steps`.

    Raises:
      ValueError: k_opt lies outside of the schedule's two ends.
    """
    first, last = -(-classes // 20), classes - 1
    if not first <= k_opt <= last:
        raise ValueError(f"k_opt: {k_opt} must be in [{first}, {last}] for {classes} classes")
    phases = jnp.asarray([0.0, easy_end, hard_start, 1.0])
    k = jnp.interp(step / steps, phases, jnp.asarray([first, k_opt, k_opt, last], jnp.float32))
    return jnp.round(k).astype(jnp.int32)


def _is_label(labels, classes: int):
    return labels[..., None] == jnp.arange(classes)


def top_k_mask(teacher_logits, labels, k):
    """keep_...xV: the teacher's `k` likeliest classes that are not the label.

    A comparison with the k-th logit, so that `k` may be traced. Classes tied with the k-th are kept
    too: what the teacher does not tell apart is treated alike (bfloat16 logits tie often).
    """
    others = ~_is_label(labels, teacher_logits.shape[-1])
    logits = jnp.where(others, teacher_logits, -jnp.inf)
    kth = jax.lax.dynamic_index_in_dim(jnp.sort(logits, axis=-1), logits.shape[-1] - k, axis=-1)
    return others & (logits >= kth)


def log_odds(logits, labels):
    """log(p_y / (1 - p_y)), shape (...,): the label's logit less the logsumexp of all others."""
    others = ~_is_label(labels, logits.shape[-1])
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1, where=others)


def _target_kl(teacher_odds, student_odds):
    """TCKD: KL of [p_y, 1 - p_y], which is that of two Bernoulli variables with these log-odds."""

    def term(t, s):
        return jax.nn.sigmoid(t) * (jax.nn.log_sigmoid(t) - jax.nn.log_sigmoid(s))

    return term(teacher_odds, student_odds) + term(-teacher_odds, -student_odds)


def _kept_kl(teacher_logits, student_logits, keep):
    """NCKD: KL over the classes in `keep`, both sides renormalised over them."""

    def log_softmax(logits):  # finite, if meaningless, outside of `keep`: 0 * it is 0
        return logits - jax.nn.logsumexp(logits, axis=-1, where=keep, keepdims=True)

    log_p = log_softmax(teacher_logits)
    probs = jnp.where(keep, jnp.exp(log_p), 0.0)
    return jnp.sum(probs * (log_p - log_softmax(student_logits)), axis=-1)


def stream_losses(teacher_logits, student_logits, labels, config: DeepKD, step):
    """The three losses of every position, weights and T^2 included.

    In kd mode without mask, streams tcg and ncg sum to T^2 KL(teacher || student).

    Args:
      teacher_logits: (..., V), no gradient flows into them.
      student_logits: (..., V).
      labels: (...,), ints; -1 where there is none, which gives 0 and no gradient.
      config: hyper-parameters.
      step: steps done; may be traced.

    Returns:
      values_...xS, float32, in the order of STREAMS; not reduced.
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    y = jnp.maximum(labels, 0)
    classes = teacher_logits.shape[-1]
    if config.k_opt is None:
        keep = ~_is_label(y, classes)
    else:
        phases = config.k_opt, config.easy_end, config.hard_start
        keep = top_k_mask(teacher_logits, y, top_k_schedule(step, config.steps, classes, *phases))
    student = student_logits.astype(jnp.float32)
    tog = -config.ce_weight * jax.nn.log_sigmoid(log_odds(student, y))

    student = student / config.temperature
    teacher = teacher_logits.astype(jnp.float32) / config.temperature
    teacher_odds = log_odds(teacher, y)
    if config.mode == "kd":
        tcg_weight, ncg_weight = 1.0, jax.nn.sigmoid(-teacher_odds)
    else:
        ramp = jnp.minimum(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
        tcg_weight, ncg_weight = ramp * config.alpha, ramp * config.beta
    square = config.temperature**2
    tcg = square * tcg_weight * _target_kl(teacher_odds, log_odds(student, y))
    ncg = square * ncg_weight * _kept_kl(teacher, student, keep)
    values = jnp.stack([tog, tcg, ncg], axis=-1) * jnp.asarray(config.weights)
    return jnp.where((labels >= 0)[..., None], values, 0.0)


# Gradients and optimiser


def stream_gradients(loss_vec_fn: Callable, params):
    """Values and gradients of the three losses, from one forward pass.

    The backward passes are unrolled, not vmapped: a vmap holds three vocabulary-sized cotangents
    at once (twice the temporary memory, by XLA's account, where the logits dominate).

    Args:
      loss_vec_fn: params -> (values_S, auxiliary output).
      params: the point at which all three are taken.

    Returns:
      (values_S, {stream: tree like params}, auxiliary output).
    """
    values, vjp, aux = jax.vjp(loss_vec_fn, params, has_aux=True)
    units = jnp.eye(len(STREAMS), dtype=values.dtype)
    return values, {s: vjp(unit)[0] for s, unit in zip(STREAMS, units, strict=True)}, aux


def gains(mu: float, deltas) -> dict[str, float]:
    """{stream: (1 - mu) / (1 - mu - delta)}: how the momenta reweigh the losses.

    A heavy ball turns a constant gradient g into g / (1 - momentum), so unequal momenta also scale
    the streams against each other (4 : 0.57 : 4 by default). The control for that, without which no
    ablation tells the two apart: equal momenta, the losses multiplied by these factors.
    """
    return {s: (1 - mu) / (1 - momentum) for s, momentum in _momenta(mu, deltas).items()}


def _zeros(params):
    return {s: optax.tree_utils.tree_zeros_like(params) for s in STREAMS}


def _total(streams):
    return jax.tree.map(lambda a, b, c: a + b + c, *(streams[s] for s in STREAMS))


def deepkd_trace(
    mu: float = 0.9,
    d_tog: float = DELTAS[0],
    d_tcg: float = DELTAS[1],
    d_ncg: float = DELTAS[2],
    *,
    normalised: bool = False,
    compat: str = "published",
) -> optax.GradientTransformation:
    """Heavy-ball momentum (v <- g + (mu + delta) v) for each stream; the update is their sum.

    Args:
      mu: common momentum.
      d_tog, d_tcg, d_ncg: what each stream adds to it.
      normalised: v <- m v + (1 - m) g instead, with which no stream gains on another (`gains`).
      compat: "published", or "released": tog takes the momentum of tcg, as the released code has
        it whatever d_tog is.

    Raises:
      ValueError: unknown `compat`; a momentum outside of [0, 1).
    """
    if compat not in ("published", "released"):
        raise ValueError(f"compat: {compat!r} is unknown; one of 'published', 'released'")
    momenta = _momenta(mu, (d_tog if compat == "published" else d_tcg, d_tcg, d_ncg))

    def update(grads, state, params=None):
        del params

        def advance(stream):
            m = momenta[stream]
            scale = 1 - m if normalised else 1.0
            return jax.tree.map(lambda g, v: scale * g + m * v, grads[stream], state.trace[stream])

        trace = {s: advance(s) for s in STREAMS}
        return _total(trace), optax.TraceState(trace)

    return optax.GradientTransformation(lambda params: optax.TraceState(_zeros(params)), update)


def scale_by_deepkd_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, deltas=DELTAS
) -> optax.GradientTransformation:
    """Adam with a first moment for each stream (decay b1 + delta) and one second moment.

    Our port, the paper uses SGD only. The second moment is that of the summed gradient: with equal
    decays this is `optax.scale_by_adam` on the sum. As moving averages the first moments do not
    reweigh the streams, `normalised` is built in.

    Raises:
      ValueError: a decay outside of [0, 1).
    """
    decays = _momenta(b1, deltas)

    def init(params):
        nu = optax.tree_utils.tree_zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), _zeros(params), nu)

    def update(grads, state, params=None):
        del params
        tree = optax.tree_utils
        count = optax.safe_increment(state.count)
        mu = {s: tree.tree_update_moment(grads[s], state.mu[s], decays[s], 1) for s in STREAMS}
        nu = tree.tree_update_moment_per_elem_norm(_total(grads), state.nu, b2, 2)
        first = _total({s: tree.tree_bias_correction(mu[s], decays[s], count) for s in STREAMS})
        second = tree.tree_bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def clip_streams_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all three streams by the one factor that clips the norm of their sum.

    The sum is what moves the parameters, so it is what a clip should bound, and a common factor
    leaves its direction and the streams' proportions alone. With equal momenta this is
    `optax.clip_by_global_norm` on the summed gradient.
    """

    def update(grads, state, params=None):
        del params
        scale = max_norm / jnp.maximum(optax.global_norm(_total(grads)), max_norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
