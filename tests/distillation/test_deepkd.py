"""DeepKD: the losses against plain KD and a float64 loop, the optimiser against optax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax.distillation import deepkd
from specjax.distillation.deepkd import STREAMS, DeepKD, stream_losses

V = 17  # a twentieth of it rounds up to 1: the schedule starts at K = 1
LABELS = jnp.asarray([[0, 3, 16], [5, 5, 11]])
HOT = DeepKD(temperature=4.0, ce_weight=0.5)
DKD = DeepKD(mode="dkd", ce_weight=1.0)
WARM = DeepKD(mode="dkd", temperature=2.0, warmup_steps=20, alpha=0.7)
MASKED = dataclasses.replace(HOT, k_opt=6, steps=100)
DKD_MASKED = dataclasses.replace(DKD, k_opt=3, steps=100)
DELTAS = (0.05, -0.1, 0.075)


def _logits(seed=0, scale=3.0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return tuple(scale * jax.random.normal(k, (*LABELS.shape, V)) for k in keys)


@functools.cache
def _compiled(config):
    def losses(teacher, student, labels, step):
        values = stream_losses(teacher, student, labels, config, step)
        return values.sum((0, 1)), values

    def evaluate(*args):
        _, vjp, values = jax.vjp(lambda t, s: losses(t, s, *args[2:]), *args[:2], has_aux=True)
        return values, *jax.vmap(vjp)(jnp.eye(3))

    return jax.jit(evaluate)


def _evaluate(config, teacher, student, step=0, labels=LABELS):
    """Values (..., S); gradients (S, ..., V) of each stream's sum by teacher and by student."""
    return tuple(
        np.asarray(x, np.float32) for x in _compiled(config)(teacher, student, labels, step)
    )


def _tree(seed, lead=()):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "w": jax.random.normal(keys[0], (*lead, 3, 2)),
        "b": jax.random.normal(keys[1], (*lead, 4)),
    }


def _streams(seed):
    return {s: _tree(10 * seed + i) for i, s in enumerate(STREAMS)}


def _sum(streams):
    return jax.tree.map(lambda *g: sum(g), *streams.values())


def _updates(optimizer, gradients, params=None):
    """Updates of one optimiser along a list of gradients."""
    params = _tree(99) if params is None else params
    state, out = optimizer.init(params), []
    for g in gradients:
        update, state = optimizer.update(g, state, params)
        out.append(update)
    return out


def _assert_close(a, b, **tolerances):
    tolerances = {"rtol": 1e-5, "atol": 1e-6} | tolerances
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerances)


# Losses


def _loop(teacher, student, y, config, k=V - 1, ramp=1.0):
    """One position in float64 probabilities, as the paper writes it."""
    softmax = lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum()  # noqa: E731
    kl = lambda p, q: np.sum(p * np.log(p / q))  # noqa: E731
    teacher, student = (np.asarray(z, np.float64) for z in (teacher, student))
    tog = -config.ce_weight * np.log(softmax(student)[y])
    p, q = (softmax(z / config.temperature) for z in (teacher, student))
    tckd = kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]]))
    others = sorted((v for v in range(V) if v != y), key=lambda v: -teacher[v])[:k]
    nckd = kl(p[others] / p[others].sum(), q[others] / q[others].sum())
    if config.mode == "kd":
        weights = 1.0, 1 - p[y]
    else:
        weights = ramp * config.alpha, ramp * config.beta
    square = config.temperature**2
    return tog, square * weights[0] * tckd, square * weights[1] * nckd


@pytest.mark.parametrize(
    "config, step, k, ramp",
    [
        (HOT, 0, V - 1, 1.0),
        (DKD, 0, V - 1, 1.0),
        (WARM, 5, V - 1, 0.25),
        (MASKED, 50, 6, 1.0),
        (DKD_MASKED, 50, 3, 1.0),
    ],
)
def test_losses_equal_the_loop(config, step, k, ramp):
    teacher, student = _logits()
    values, *_ = _evaluate(config, teacher, student, step)
    for b, t in np.ndindex(*LABELS.shape):
        expected = _loop(teacher[b, t], student[b, t], LABELS[b, t], config, k, ramp)
        np.testing.assert_allclose(values[b, t], expected, rtol=1e-4, atol=1e-6)


def _kd(teacher, student, temperature):
    log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (teacher, student))
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def test_the_two_distillation_streams_sum_to_kd():
    teacher, student = _logits(1)

    def kd(s):
        values = _kd(teacher, s, HOT.temperature)
        return values.sum(), values

    gradient, expected = jax.jit(jax.grad(kd, has_aux=True))(student)
    values, _, gradients = _evaluate(HOT, teacher, student)
    np.testing.assert_allclose(values[..., 1] + values[..., 2], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[1] + gradients[2], gradient, atol=1e-5)


def test_the_warm_up_starts_at_nothing_and_leaves_the_task_alone():
    start, end, later = (_evaluate(WARM, *_logits(), step)[0] for step in (0, 20, 30))
    assert not start[..., 1:].any() and end[..., 1:].all()
    np.testing.assert_array_equal(end, later)
    np.testing.assert_array_equal(start[..., 0], end[..., 0])


@pytest.mark.parametrize("config", [HOT, DKD, MASKED])
@pytest.mark.parametrize("step", [0, 50])
def test_teachers_and_missing_labels_get_no_gradient(config, step):
    teacher, student = _logits(3)
    values, by_teacher, by_student = _evaluate(
        config, teacher, student, step, LABELS.at[1, 2].set(-1)
    )
    assert not by_teacher.any()
    assert not values[1, 2].any() and not by_student[:, 1, 2].any()
    whole = _evaluate(config, teacher, student, step)
    np.testing.assert_array_equal(values[0], whole[0][0])
    np.testing.assert_array_equal(by_student[:, 0], whole[2][:, 0])
    assert whole[0][1, 2].any() and whole[2][:, 1, 2].any()
    nothing = _evaluate(config, 1e4 * teacher, -1e4 * student, step, jnp.full_like(LABELS, -1))
    assert not any(x.any() for x in nothing)


@pytest.mark.parametrize(
    "config, dtype", [(HOT, jnp.float32), (DKD, jnp.float32), (MASKED, jnp.bfloat16)]
)
def test_bfloat16_extremes_stay_finite(config, dtype):
    logits = jnp.full((*LABELS.shape, V), -1e4).at[..., :3].set(jnp.asarray([1e4, -1e4, 0.0]))
    logits, labels = logits.astype(jnp.bfloat16).astype(dtype), jnp.asarray([[0, 1, 2], [3, 4, -1]])
    for step in (0, 50, 100):
        for student in (-logits, logits, 0 * logits):
            results = _evaluate(config, logits, student, step, labels)
            assert all(np.isfinite(x).all() for x in results)
    assert _compiled(config)(logits, logits, labels, 0)[0].dtype == jnp.float32


def test_a_confident_teacher_keeps_its_small_tail():
    # 1 - p_y is about 2e-13, which 1 - exp(log p_y) in float32 would round to 0.
    teacher = jnp.zeros((*LABELS.shape, V)).at[0, 1, 3].set(32.0 * HOT.temperature)
    _, student = _logits()
    values = _evaluate(HOT, teacher, student)[0][0, 1]
    expected = _loop(teacher[0, 1], student[0, 1], 3, HOT)
    assert 0 < expected[2] < 1e-11
    np.testing.assert_allclose(values[2], expected[2], rtol=1e-2)


# Dynamic top-k mask


@pytest.mark.parametrize("classes, k_opt", [(17, 6), (130, 7), (140, 139), (32000, 12000)])
def test_schedule(classes, k_opt):
    traces = []

    @jax.jit
    def schedule(step):
        traces.append(step)
        return deepkd.top_k_schedule(step, 300, classes, k_opt, 0.3, 0.6)

    k = np.asarray([schedule(step) for step in range(0, 331, 10)])
    assert len(traces) == 1
    assert k[0] == -(-classes // 20)
    assert (k[9:19] == k_opt).all()  # steps 90..180
    assert (k[30:] == classes - 1).all()
    assert (np.diff(k) >= 0).all()
    for start, stop in ((0, 9), (18, 30)):  # straight up to the rounding
        line = np.linspace(k[start], k[stop], stop - start + 1)
        assert np.abs(k[start : stop + 1] - line).max() <= 0.51


@pytest.mark.parametrize("k_opt", [4, 100])
def test_schedule_refuses_an_optimum_outside_of_it(k_opt):
    with pytest.raises(ValueError, match=r"k_opt: \d+ must be in \[5, 99\]"):
        deepkd.top_k_schedule(0, 10, 100, k_opt)


def test_the_schedule_recompiles_nothing_and_moves_ncg_alone():
    teacher, student = _logits()
    values = [_evaluate(MASKED, teacher, student, 0)[0]]
    compiled = _compiled(MASKED)._cache_size()
    values += [_evaluate(MASKED, teacher, student, step)[0] for step in (20, 50, 80, 100)]
    assert _compiled(MASKED)._cache_size() == compiled
    for before, after in zip(values, values[1:], strict=False):
        np.testing.assert_array_equal(before[..., :2], after[..., :2])
        assert (before[..., 2] != after[..., 2]).all()


@pytest.mark.parametrize("config, bare", [(MASKED, HOT), (DKD_MASKED, DKD)])
def test_limits_of_the_mask(config, bare):
    teacher, student = _logits(4)
    # Step 0: one class is left, whose renormalised probability is 1 on both sides.
    values, _, gradients = _evaluate(config, teacher, student, 0)
    assert not values[..., 2].any() and not gradients[2].any()
    # The last step: all but the label.
    _assert_close(_evaluate(config, teacher, student, 100), _evaluate(bare, teacher, student))


def test_the_mask_reads_the_teacher_alone():
    teacher, student = _logits(5)
    keep = np.asarray(deepkd.top_k_mask(teacher, LABELS, 6))
    np.testing.assert_array_equal(keep.sum(-1), 6)
    for b, t in np.ndindex(*LABELS.shape):
        order = [v for v in np.argsort(-teacher[b, t]) if v != LABELS[b, t]]
        assert set(np.flatnonzero(keep[b, t])) == set(order[:6])
    # So do the losses: the student's logits outside of it get no gradient, those in it do.
    gradients = _evaluate(MASKED, teacher, student, 50)[2][2]
    np.testing.assert_array_equal(gradients != 0, keep)


def test_ties_at_the_threshold_are_kept():
    teacher = jnp.asarray([[4.0, 9.0, 2.0, 2.0, 2.0, 1.0]])  # the label leads and does not count
    for k, kept in ((1, [0]), (2, [0, 2, 3, 4]), (4, [0, 2, 3, 4]), (5, [0, 2, 3, 4, 5])):
        keep = deepkd.top_k_mask(teacher, jnp.asarray([1]), k)
        assert np.flatnonzero(keep[0]).tolist() == kept


# Gradients of the streams


def test_stream_gradients_equal_three_backward_passes():
    params, calls = _tree(6), []

    def loss_vec(p):
        calls.append(p)
        hidden = jnp.tanh(jnp.outer(p["w"], p["b"]))
        return jnp.stack([hidden.sum(), (hidden**2).sum(), jnp.exp(hidden).sum()]), hidden

    values, gradients, aux = jax.jit(lambda p: deepkd.stream_gradients(loss_vec, p))(params)
    assert len(calls) == 1
    _assert_close((values, aux), loss_vec(params))
    for i, stream in enumerate(STREAMS):
        _assert_close(gradients[stream], jax.grad(lambda p, i=i: loss_vec(p)[0][i])(params))


# Optimiser


def test_equal_momenta_are_sgd_on_cross_entropy_and_kd():
    """A whole trajectory, without and with coupled weight decay (which any one stream can take)."""
    optimizer = optax.chain(deepkd.deepkd_trace(0.9, 0, 0, 0), optax.scale_by_learning_rate(0.05))
    sgd = optax.sgd(0.05, momentum=0.9)
    teacher, x = _logits(6)
    weights = jax.random.normal(jax.random.key(7), (V, V))

    def stream_means(params):
        return stream_losses(teacher, jnp.tanh(x @ params), LABELS, HOT, 0).mean((0, 1)), None

    def loss(params):
        student = jnp.tanh(x @ params)
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(student, LABELS)
        return jnp.mean(HOT.ce_weight * hard + _kd(teacher, student, HOT.temperature))

    @jax.jit
    def step(ours, theirs, decay):
        params, state = ours
        streams = deepkd.stream_gradients(stream_means, params)[1]
        streams["tcg"] += decay * params
        updates, state = optimizer.update(streams, state, params)
        ours = optax.apply_updates(params, updates), state
        params, state = theirs
        updates, state = sgd.update(jax.grad(loss)(params) + decay * params, state, params)
        return ours, (optax.apply_updates(params, updates), state)

    for decay in (0.0, 0.1):
        ours, theirs = (weights, optimizer.init(weights)), (weights, sgd.init(weights))
        for _ in range(6):
            ours, theirs = step(ours, theirs, decay)
        _assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
        assert np.abs(ours[0] - weights).max() > 0.05


@pytest.mark.parametrize("index, stream", enumerate(STREAMS))
def test_one_stream_alone_is_sgd_with_its_momentum(index, stream):
    gradients = [_streams(i) for i in range(5)]
    zero = jax.tree.map(jnp.zeros_like, _tree(0))
    alone = [{s: g[s] if s == stream else zero for s in STREAMS} for g in gradients]
    expected = _updates(optax.trace(0.9 + DELTAS[index]), [g[stream] for g in gradients])
    _assert_close(_updates(deepkd.deepkd_trace(0.9, *DELTAS), alone), expected)


@pytest.mark.parametrize(
    "optimizer", [deepkd.deepkd_trace(0.9, 0, 0, 0), deepkd.scale_by_deepkd_adam(deltas=(0, 0, 0))]
)
def test_streams_of_equal_momenta_may_be_permuted(optimizer):
    gradients = [_streams(i) for i in range(4)]
    permuted = [dict(zip(STREAMS, (g["ncg"], g["tog"], g["tcg"]), strict=True)) for g in gradients]
    _assert_close(_updates(optimizer, permuted), _updates(optimizer, gradients))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("compat", ["published", "released"])
def test_the_trace_is_linear(normalised, compat):
    optimizer = deepkd.deepkd_trace(0.9, *DELTAS, normalised=normalised, compat=compat)
    one, two = ([_streams(10 * n + i) for i in range(4)] for n in (1, 2))
    mix = jax.tree.map(lambda a, b: 2 * a - 3 * b, one, two)
    expected = jax.tree.map(
        lambda a, b: 2 * a - 3 * b, _updates(optimizer, one), _updates(optimizer, two)
    )
    _assert_close(_updates(optimizer, mix), expected, rtol=1e-4, atol=1e-4)


def _steady(optimizer, gradient, steps=1500):
    state = optimizer.init(_tree(0))

    @jax.jit
    def run(state):
        body = lambda state, _: (optimizer.update(gradient, state)[1], None)  # noqa: E731
        state, _ = jax.lax.scan(body, state, length=steps)
        return optimizer.update(gradient, state)[0]

    return run(state)


def test_constant_gradients_converge_to_their_gain():
    streams, momenta = _streams(1), (0.95, 0.8, 0.975)
    expected = _sum(
        {s: jax.tree.map(lambda g, m=m: g / (1 - m), streams[s]) for s, m in zip(STREAMS, momenta)}  # noqa: B905
    )
    _assert_close(_steady(deepkd.deepkd_trace(0.9, *DELTAS), streams), expected, rtol=1e-3)
    # As a moving average every stream comes out as it went in.
    average = deepkd.deepkd_trace(0.9, *DELTAS, normalised=True)
    _assert_close(_steady(average, streams), _sum(streams), rtol=1e-3, atol=1e-4)


def test_the_control_reaches_the_same_steady_state():
    streams, factors = _streams(2), deepkd.gains(0.9, deepkd.DELTAS)
    np.testing.assert_allclose([factors[s] for s in STREAMS], [4, 1 / 1.75, 4], rtol=1e-6)
    scaled = _sum({s: jax.tree.map(lambda g, s=s: factors[s] * g, streams[s]) for s in STREAMS})
    _assert_close(
        _steady(deepkd.deepkd_trace(), streams), _steady(optax.trace(0.9), scaled), rtol=1e-3
    )
    # and gets there by another way
    first = _updates(deepkd.deepkd_trace(), [streams])
    assert not np.allclose(first[0]["w"], _updates(optax.trace(0.9), [scaled])[0]["w"], rtol=0.1)


def test_the_released_rule_equals_its_port():
    """Three passes over the parameters in place, tog by tcg's momentum (no weight decay)."""
    gradients = [_streams(i) for i in range(5)]
    lr, m_tcg, m_ncg = 0.1, 0.8, 0.975
    p = {k: np.array(v) for k, v in _tree(99).items()}
    start, buffers = {k: v.copy() for k, v in p.items()}, {}
    for g in gradients:
        for stream, m in (("tog", m_tcg), ("ncg", m_ncg), ("tcg", m_tcg)):
            for k in p:
                first = (stream, k) not in buffers
                old = 0 if first else m * buffers[stream, k]
                buffers[stream, k] = old + np.asarray(g[stream][k])
                p[k] -= lr * buffers[stream, k]

    def end(*args, **kwargs):
        updates = _updates(deepkd.deepkd_trace(*args, **kwargs), gradients)
        return {k: start[k] - lr * sum(u[k] for u in updates) for k in start}

    released = end(0.9, *DELTAS, compat="released")
    _assert_close(released, p, rtol=1e-4, atol=1e-5)
    _assert_close(
        released, end(0.9, DELTAS[1], *DELTAS[1:])
    )  # the published rule at mu_tog := mu_tcg
    assert not np.allclose(released["w"], end(0.9, *DELTAS)["w"], rtol=1e-2)


def test_adam_without_deltas_is_adam():
    gradients = [_streams(i) for i in range(6)]
    ours = _updates(deepkd.scale_by_deepkd_adam(0.9, 0.95, 1e-6, (0, 0, 0)), gradients)
    _assert_close(
        ours, _updates(optax.scale_by_adam(0.9, 0.95, 1e-6), [_sum(g) for g in gradients])
    )


def test_adam_equals_a_loop():
    gradients = [_streams(i) for i in range(5)]
    ours = _updates(deepkd.scale_by_deepkd_adam(0.85, 0.95, 1e-6, DELTAS), gradients)
    m, v = dict.fromkeys(STREAMS, 0.0), 0.0
    for n, (g, update) in enumerate(zip(gradients, ours, strict=True), 1):
        hat = 0.0
        for stream, delta in zip(STREAMS, DELTAS, strict=True):
            b = 0.85 + delta
            m[stream] = b * m[stream] + (1 - b) * np.asarray(g[stream]["w"], np.float64)
            hat = hat + m[stream] / (1 - b**n)
        v = 0.95 * v + 0.05 * np.asarray(_sum(g)["w"], np.float64) ** 2
        np.testing.assert_allclose(
            update["w"], hat / (np.sqrt(v / (1 - 0.95**n)) + 1e-6), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_the_clip_bounds_the_sum(max_norm):
    gradients = [_streams(i) for i in range(4)]
    clip = deepkd.clip_streams_by_global_norm(max_norm)
    for before, after in zip(gradients, _updates(clip, gradients), strict=True):
        norm = optax.global_norm(_sum(before))
        np.testing.assert_allclose(optax.global_norm(_sum(after)), min(norm, max_norm), rtol=1e-5)
        factor = min(1.0, max_norm / norm)
        _assert_close(after, jax.tree.map(lambda g, f=factor: f * g, before))
    # In front of equal momenta: the usual clip in front of the usual momentum.
    chained = optax.chain(clip, deepkd.deepkd_trace(0.9, 0, 0, 0))
    usual = optax.chain(optax.clip_by_global_norm(max_norm), optax.trace(0.9))
    _assert_close(_updates(chained, gradients), _updates(usual, [_sum(g) for g in gradients]))


def test_the_clip_passes_zeros():
    zero = jax.tree.map(jnp.zeros_like, _streams(0))
    _assert_close(_updates(deepkd.clip_streams_by_global_norm(1.0), [zero]), [zero])


@pytest.mark.parametrize(
    "core, weights",
    [
        (deepkd.deepkd_trace(), list(deepkd.gains(0.9, deepkd.DELTAS).values())),
        (deepkd.deepkd_trace(normalised=True), [1, 1, 1]),
        (deepkd.scale_by_deepkd_adam(), [1, 1, 1]),
    ],
)
def test_a_chain_settles_between_its_streams(core, weights):
    """Where three parabolas balance: heavy balls weigh them by their gains, averages alike."""
    ends = jnp.asarray([1.0, 2.0, 6.0])
    optimizer = optax.chain(
        deepkd.clip_streams_by_global_norm(10.0),
        core,
        optax.add_decayed_weights(1e-6),
        optax.scale_by_learning_rate(0.003),
    )

    def step(carry, _):
        x, state = carry
        _, gradients, _ = deepkd.stream_gradients(lambda x: ((x - ends) ** 2, None), x)
        updates, state = optimizer.update(gradients, state, x)
        return (optax.apply_updates(x, updates), state), None

    start = jnp.zeros(()), optimizer.init(jnp.zeros(()))
    (x, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=4000))(start)
    np.testing.assert_allclose(x, np.average(ends, weights=weights), rtol=1e-3)


def test_scaled_losses_with_equal_momenta_settle_where_the_heavy_balls_do():
    """The control for the momenta's reweighing: constant gradients, weights `gains`, one mu."""
    mu, deltas = 0.9, deepkd.DELTAS
    weights = tuple(deepkd.gains(mu, deltas).values())
    config = DeepKD(deltas=(0.0, 0.0, 0.0), weights=weights)
    plain, *_ = _evaluate(DeepKD(), *_logits())
    scaled, *_ = _evaluate(config, *_logits())
    np.testing.assert_allclose(scaled, plain * np.array(weights), rtol=1e-5)
    gradients = {s: jnp.asarray(float(i + 1)) for i, s in enumerate(STREAMS)}
    weighted = {s: g * w for (s, g), w in zip(gradients.items(), weights, strict=True)}
    unequal = _updates(deepkd.deepkd_trace(mu, *deltas), 600 * [gradients], jnp.zeros(()))
    equal = _updates(deepkd.deepkd_trace(mu, 0, 0, 0), 600 * [weighted], jnp.zeros(()))
    np.testing.assert_allclose(unequal[-1], equal[-1], rtol=1e-4)
    assert abs(unequal[-1] - sum(gradients.values()) / (1 - mu)) > 1  # not what mu alone gives


# Refusals


@pytest.mark.parametrize(
    "field, value",
    [
        ("mode", "mlkd"),
        ("mu", 1.0),
        ("deltas", (0.1, -0.075, 0.075)),
        ("deltas", (0.0, -0.95, 0.0)),
        ("deltas", (0.05, -0.05)),
        ("weights", (1.0, 1.0)),
        ("weights", (1.0, -1.0, 1.0)),
        ("temperature", 0.0),
        ("ce_weight", -0.1),
        ("alpha", -1.0),
        ("beta", float("nan")),
        ("warmup_steps", -1),
        ("k_opt", 0),
        ("steps", 0),
        ("easy_end", 0.0),
        ("hard_start", 0.2),
    ],
)
def test_bad_fields_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        dataclasses.replace(MASKED, **{field: value})


def test_bad_optimisers_are_refused():
    with pytest.raises(ValueError, match="compat: 'pytorch' is unknown"):
        deepkd.deepkd_trace(compat="pytorch")
    with pytest.raises(ValueError, match="deltas: .* 0.95"):
        deepkd.scale_by_deepkd_adam(b1=0.95)
