"""Gates against their definitions in NumPy, the limits they share, and what may not move them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.distillation.divergences import forward_kl
from specjax.distillation.gates import (
    GATES,
    AdaSpec,
    Everything,
    Recorded,
    Rejected,
    SpecKD,
    acceptance_rate,
    get_gate,
)

B, T, N, V = 2, 9, 3, 9
EVERY_GATE = {
    "everything": Everything(),
    "greedy": SpecKD(k=2, warmup_steps=5),
    "sampled": SpecKD(k=2, beta=0.0, accept="sampled", prefix=True),
    "expected": SpecKD(k=2, accept="expected"),
    "adaspec": AdaSpec(),
    "recorded": Recorded(),
    "rejected": Rejected(),
}
ALL = pytest.mark.parametrize("gate", EVERY_GATE.values(), ids=EVERY_GATE)


def batch(seed):
    """(teacher, student, labels, state): labels shifted by depth, a prompt and an end left out."""
    rng = np.random.default_rng(seed)
    teacher, student, reference = rng.normal(0, 1.5, (3, B, T, N, V)).astype(np.float32)
    tokens = rng.integers(0, V, (B, T + N + 1))
    tokens[:, T:], tokens[1, :4] = -1, -1
    labels = np.stack([tokens[:, i : i + T] for i in range(2, N + 2)], axis=-1)
    state = {
        "step": 2,
        "key": jax.random.key(seed),
        "reference": reference,
        "recorded": rng.random((B, T, N)) < 0.5,
    }
    return teacher, student, labels, state


def compiled(f):
    """f(gate, *arrays), jitted (unoptimised: it runs once or twice), with NumPy results."""
    f = jax.jit(f, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
    return lambda *args: jax.tree.map(np.asarray, f(*args))


@compiled
def weights(gate, teacher, student, labels, state):
    return gate(teacher, student, labels, state)


@compiled
def observe(gate, teacher, student, labels, state):
    return gate.observe(teacher, student, labels, state)


@compiled
def weigh(gate, seen, valid):
    return gate.weigh(seen, valid, {})


@compiled
@functools.partial(jax.value_and_grad, argnums=2)
def loss(gate, teacher, student, labels, state):
    """What the gates are for: weighted before the sum, divided by all valid positions."""
    weight = gate(teacher, student, labels, state)
    return jnp.sum(weight * forward_kl(teacher, student)) / jnp.maximum(jnp.sum(labels >= 0), 1)


def probs(logits):
    exponentials = np.exp(np.asarray(logits, np.float64))
    return exponentials / exponentials.sum(-1, keepdims=True)


def tvd(teacher, student):
    return 0.5 * np.abs(probs(teacher) - probs(student)).sum(-1)


def kl(teacher, student):
    p, q = probs(teacher), probs(student)
    return (p * np.log(p / q)).sum(-1)


# What holds for every gate


@ALL
def test_weights_are_float32_and_zero_exactly_where_nothing_is_to_learn(gate):
    teacher, student, labels, state = batch(0)
    assert 0 < (labels >= 0).sum() < labels.size
    weight = weights(gate, teacher, student, labels, state)
    assert weight.dtype == jnp.float32 and weight.shape == (B, T, N)
    assert not np.any(weight[labels < 0]) and np.any(weight)


@ALL
def test_no_gradient_passes_either_step(gate):
    teacher, student, labels, state = batch(1)

    @compiled
    @functools.partial(jax.grad, argnums=(1, 2))
    def gradients(gate, logits, scale):
        teacher, student, reference = logits
        now = state | {"reference": reference}
        seen = gate.observe(teacher, student, labels, now)
        weight = gate.weigh(scale * seen, labels >= 0, now)
        return jnp.sum(seen) + jnp.sum(weight)

    grads = gradients(gate, (teacher, student, state["reference"]), 1.0)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


@ALL
def test_the_gradient_is_the_weighted_difference_over_the_full_count(gate):
    teacher, student, labels, state = batch(2)
    _, grad = loss(gate, teacher, student, labels, state)
    weight = weights(gate, teacher, student, labels, state)
    expected = weight[..., None] * (probs(student) - probs(teacher)) / np.sum(labels >= 0)
    np.testing.assert_allclose(grad, expected, atol=1e-6)
    assert not np.any(grad[weight == 0])


@ALL
def test_finite_and_zero_when_nothing_is_selected(gate):
    teacher, student, labels, state = batch(3)
    one_depth_less = np.where(np.arange(N) == 1, -1, labels)
    state["recorded"] = np.zeros_like(state["recorded"])
    for labels_ in (np.full_like(labels, -1), one_depth_less):
        weight = weights(gate, teacher, student, labels_, state)
        assert np.isfinite(weight).all() and not np.any(weight[..., 1])
        value, grad = loss(gate, teacher, student, labels_, state)
        assert np.isfinite(value) and np.isfinite(grad).all()


@ALL
def test_padding_changes_nothing(gate):
    teacher, student, labels, state = batch(4)
    weight = weights(gate, teacher, student, labels, state)
    for junk in (100.0, np.nan):

        def pad(x, value, best=None):
            """Two sequences and three rows more; in them, one token stands out."""
            x = np.pad(x, [(0, 2), (0, 3)] + [(0, 0)] * (x.ndim - 2), constant_values=value)
            if best is not None:
                x[B:, ..., best] = x[:, T:, ..., best] = junk  # noqa: B023
            return x

        # The student far from the teacher and the reference on it: a huge excess.
        now = state | {"recorded": pad(state["recorded"], True)}
        now["reference"] = pad(state["reference"], 0, best=0)
        padded = weights(
            gate, pad(teacher, 0, best=0), pad(student, 0, best=1), pad(labels, -1), now
        )
        np.testing.assert_array_equal(padded[:B, :T], weight)
        assert not np.any(padded[B:]) and not np.any(padded[:, T:])


@ALL
def test_observing_chunks_of_one_depth_is_observing_the_whole(gate):
    teacher, student, labels, state = batch(5)
    whole = observe(gate, teacher, student, labels, state)
    assert whole.dtype == jnp.float32 and whole.shape == (B, T, N)

    for i in range(N):
        for t in range(0, T, 3):
            cut = np.s_[:, t : t + 3, i]
            there = state | {"reference": state["reference"][cut]}
            part = observe(gate, teacher[cut], student[cut], labels[cut], there)
            np.testing.assert_allclose(part, whole[cut], atol=1e-6)


@ALL
def test_one_compilation_serves_every_step(gate):
    teacher, student, labels, state = batch(6)
    compiled = jax.jit(gate.__call__)
    for step in range(7):
        now = state | {"step": jnp.int32(step), "key": jax.random.key(step)}
        assert np.isfinite(compiled(teacher, student, labels, now)).all()
    assert compiled._cache_size() == 1


@ALL
def test_bfloat16_extremes_give_finite_weights(gate):
    teacher, student, labels, state = batch(7)
    wild = lambda x: (1e4 * np.sign(x)).astype(jnp.bfloat16)  # noqa: E731
    state["reference"] = wild(state["reference"])
    teacher, student = wild(teacher), wild(student)
    teacher[..., 0] = -np.inf
    weight = weights(gate, teacher, student, labels, state)
    assert weight.dtype == jnp.float32 and np.isfinite(weight).all() and np.all(weight >= 0)


# SpecKD


@pytest.mark.parametrize("accept", ["greedy", "sampled", "expected"])
def test_reductions_to_plain_distillation(accept):
    teacher, student, labels, state = batch(10)
    plain = labels >= 0
    same = SpecKD(beta=1.0, accept=accept)
    np.testing.assert_array_equal(weights(same, teacher, student, labels, state), plain)
    agreeing = SpecKD(beta=0.0, accept=accept, prefix=True)
    np.testing.assert_array_equal(weights(agreeing, teacher, teacher, labels, state), plain)


@pytest.mark.parametrize("k", [V, V + 3])
def test_a_top_k_of_the_whole_vocabulary_is_plain_distillation(k):
    teacher, student, labels, state = batch(10)
    gate = SpecKD(k=k, beta=0.0)
    np.testing.assert_array_equal(weights(gate, teacher, student, labels, state), labels >= 0)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_greedy_accepts_the_argmax_inside_the_top_k_ties_in(k):
    for seed in range(5):
        teacher, student, labels, state = batch(seed)
        teacher = np.round(teacher)  # many ties
        kth = np.sort(teacher, axis=-1)[..., -k]
        best = np.argmax(student, axis=-1)[..., None]
        accepted = np.take_along_axis(teacher, best, -1)[..., 0] >= kth
        expected = np.where(labels < 0, 0, np.where(accepted, 1, 0.25))
        gate = SpecKD(k=k, beta=0.25)
        np.testing.assert_array_equal(weights(gate, teacher, student, labels, state), expected)


@pytest.mark.parametrize("accept", ["greedy", "expected"])
def test_the_acceptance_rate_grows_with_k_at_every_depth(accept):
    teacher, student, labels, state = batch(12)
    valid = labels >= 0

    @compiled
    def rate(gate, valid):
        seen = gate.observe(teacher, student, labels, state)
        return seen, acceptance_rate(jnp.where(valid, seen, jnp.nan), valid)

    rates = []
    for k in (1, 2, 5, V):
        seen, rate_N = rate(SpecKD(k=k, accept=accept), valid)
        by_hand = [seen[..., i][valid[..., i]].mean() for i in range(N)]
        np.testing.assert_allclose(rate_N, by_hand, rtol=1e-5)
        rates.append(rate_N)
    assert np.all(np.diff(rates, axis=0) >= -1e-6)
    assert np.all(rates[0] < rates[-1]) and np.all(rates[-1] <= 1)
    assert not np.any(rate(SpecKD(k=V, accept=accept), np.zeros_like(valid))[1])


@pytest.mark.parametrize("k", [1, 3])
def test_one_coin_has_the_law_of_k_draws(k):
    samples, rng = 20_000, np.random.default_rng(13)
    teacher, student = 1.5 * rng.normal(size=(2, V)).astype(np.float32)
    p, q = probs(teacher), probs(student)
    closed = 1 - tvd(teacher, student) ** k
    draws = rng.choice(V, size=(samples, k), p=q)
    passed = rng.random((samples, k)) < np.minimum(1, p[draws] / q[draws])
    rows = (2, samples // 4, 2)
    args = [np.broadcast_to(x, (*rows, V)) for x in (teacher, student)] + [np.zeros(rows, int)]
    gate = SpecKD(k=k, beta=0.25, accept="sampled")
    weight, again = (weights(gate, *args, {"key": jax.random.key(i)}) for i in (0, 1))
    assert set(np.unique(weight)) == {0.25, 1.0}
    error = 4.5 * np.sqrt(closed * (1 - closed) / samples)
    assert abs(passed.any(-1).mean() - closed) < error
    assert abs((weight == 1).mean() - closed) < error
    # Independent between sequences, rows, depths and keys.
    hits = (weight == 1) - closed
    for pair in (
        (hits[0], hits[1]),
        (hits[:, 1:], hits[:, :-1]),
        (hits[..., 0], hits[..., 1]),
        (hits, (again == 1) - closed),
    ):
        covariance = np.mean(pair[0] * pair[1])
        assert abs(covariance) < 4.5 * closed * (1 - closed) / np.sqrt(pair[0].size)


def test_expected_is_the_mean_of_sampled():
    teacher, student, labels, state = batch(17)
    expected = np.where(labels >= 0, 0.25 + 0.75 * (1 - tvd(teacher, student) ** 3), 0)
    gate = SpecKD(k=3, beta=0.25, accept="expected")
    np.testing.assert_allclose(weights(gate, teacher, student, labels, state), expected, atol=1e-6)


def test_rejected_tokens_still_count_in_the_mean():
    teacher, student, labels, state = batch(19)
    # Sequence 1: the student's best token is the teacher's worst.
    student[1] = -teacher[1]
    labels = np.abs(labels)
    alone = np.where(np.arange(B)[:, None, None] == 1, -1, labels)
    gate = SpecKD(k=1, beta=0.0)
    once, _ = loss(gate, teacher, student, alone, state)
    both, _ = loss(gate, teacher, student, labels, state)
    assert once > 0
    np.testing.assert_allclose(both, once / 2, rtol=1e-6)


def test_the_weight_of_rejected_tokens_warms_down_to_beta():
    teacher, _, labels, state = batch(20)
    gate = SpecKD(k=1, beta=0.25, warmup_steps=4)
    for step, beta in enumerate([1, 0.8125, 0.625, 0.4375, 0.25, 0.25, 0.25]):
        weight = weights(gate, teacher, -teacher, labels, {"step": step})
        np.testing.assert_array_equal(weight[labels >= 0], np.float32(beta))


def test_a_prefix_is_accepted_whole():
    seen = np.float32([[[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1]]])
    valid = np.ones_like(seen, bool)
    valid[0, 3, 0] = False  # neither counts nor rejects what follows
    low = 0.25
    expected = [[1, 1, low, low], [low] * 4, [1] * 4, [0, 1, low, low]]
    np.testing.assert_array_equal(weigh(SpecKD(beta=low, prefix=True), seen, valid)[0], expected)


# AdaSPEC


def test_keeps_the_positions_above_numpys_quantile_within_each_depth():
    for seed in range(30, 36):
        teacher, student, labels, state = batch(seed)
        # Deeper means worse: one quantile over all depths would keep only the last.
        student = student * np.arange(1, N + 1, dtype=np.float32)[:, None]
        excess, valid = kl(teacher, student) - kl(teacher, state["reference"]), labels >= 0
        weight = weights(AdaSpec(0.4, normalise=False), teacher, student, labels, state)
        for i in range(N):
            bound = np.quantile(excess[..., i][valid[..., i]], 0.6)
            keep = valid[..., i] & (excess[..., i] >= bound)
            np.testing.assert_array_equal(weight[..., i], keep)


@pytest.mark.parametrize("percent", [1, 25, 40, 70, 100])
def test_the_number_kept(percent):
    kept_at = {}
    for n in (1, 2, 5, 9, 11, 40, 101):
        seen = 0.37 * np.random.default_rng(n).permutation(101).astype(np.float32)
        seen, valid = np.stack([seen, -seen], axis=-1)[None], np.arange(101) < n
        valid = np.broadcast_to(valid[:, None], seen.shape)
        kept_at[n] = n - -(-(100 - percent) * (n - 1) // 100)  # n - ceil((1 - k)(n - 1))
        weight = weigh(AdaSpec(percent / 100), seen, valid)
        np.testing.assert_array_equal(np.sum(weight > 0, axis=(0, 1)), [kept_at[n]] * 2)
    if percent == 40:
        assert [kept_at[n] for n in (5, 9, 11, 40)] == [2, 4, 5, 16]


@pytest.mark.parametrize("fraction", [0.4, 0.73])
def test_ties_are_all_kept(fraction):
    teacher, student, labels, state = batch(41)
    state["reference"], gate = student, AdaSpec(fraction, normalise=False)
    np.testing.assert_array_equal(weights(gate, teacher, student, labels, state), labels >= 0)
    for value in np.random.default_rng(0).normal(size=30):  # none may be lost to rounding
        tied = np.full(labels.shape, value, np.float32)
        np.testing.assert_array_equal(weigh(gate, tied, labels >= 0), labels >= 0)


def test_fraction_one_is_plain_distillation():
    teacher, student, labels, state = batch(42)
    weight = weights(AdaSpec(1.0), teacher, student, labels, state)
    np.testing.assert_array_equal(weight, labels >= 0)


def test_a_constant_excess_changes_nothing():
    teacher, student, labels, state = batch(43)
    seen = np.round(observe(AdaSpec(), teacher, student, labels, state) * 64) / 64  # exact sums
    weight = weigh(AdaSpec(), seen, labels >= 0)
    for constant in np.float32([-8.0, 0.5, 1000.0]):
        np.testing.assert_array_equal(weigh(AdaSpec(), seen + constant, labels >= 0), weight)


def test_normalised_weights_divide_by_the_fraction():
    teacher, student, labels, state = batch(44)
    paper, code = (weights(AdaSpec(0.4, n), teacher, student, labels, state) for n in (True, False))
    np.testing.assert_array_equal(paper, np.float32(1 / 0.4) * code)
    assert set(np.unique(code)) == {0, 1}


# Recorded positions


def test_only_recorded_positions_learn():
    teacher, student, labels, state = batch(50)
    labels = np.abs(labels)
    plain, _ = loss(Everything(), teacher, student, labels, state)
    state["recorded"] = np.ones_like(state["recorded"])
    np.testing.assert_array_equal(loss(Recorded(), teacher, student, labels, state)[0], plain)
    # Row 2 of sequence 1 lost its draft at depth 3: its label is token 2 + 1 + 3, its weight there.
    state["recorded"] = np.zeros_like(state["recorded"])
    state["recorded"][1, 2, 2] = True
    _, grad = loss(Recorded(), teacher, student, labels, state)
    np.testing.assert_array_equal(np.any(grad != 0, axis=-1), state["recorded"])


# By name


def test_by_name():
    for name, gate in GATES.items():
        assert get_gate(name) == gate() and gate.name == name
        assert hash(get_gate(name)) == hash(gate())  # static under jit
    assert get_gate("speckd", k=3, prefix=True) == SpecKD(k=3, prefix=True)


def test_rejected_is_where_a_greedy_walk_stops():
    """Against a loop over rounds: draft, accept while right, record, go on past the correction."""
    marks, rows = np.zeros(N), 0
    for seed in range(50, 56):
        teacher, student, labels, state = batch(seed)
        labels = np.where(labels >= 0, labels % 2, labels)  # two tokens: drafts are often right
        teacher, student = teacher[..., :2], student[..., :2]
        right = student.argmax(-1) == labels
        expected = np.zeros(labels.shape)
        for b in range(B):
            t = 0
            while t < T:
                taken = 0
                while taken < N and right[b, t, taken]:
                    taken += 1
                if taken < N and labels[b, t, taken] >= 0:
                    expected[b, t, taken] = 1
                t += taken + 1
        found = np.asarray(weights(Rejected(), teacher, student, labels, state))
        np.testing.assert_array_equal(found, expected)
        marks, rows = marks + expected.sum((0, 1)), rows + (labels >= 0).any(-1).sum()
    assert (marks > 0).all() and marks.sum() < rows / 2  # every depth; most rows jumped over


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("none", {}, "'none' is unknown.*everything.*speckd.*adaspec.*recorded"),
        ("everything", {"k": 1}, "everything.*'k'"),
        ("speckd", {"kk": 1}, "speckd.*'kk'"),
        ("speckd", {"k": 0}, "k 0 "),
        ("speckd", {"k": 1.5}, "k 1.5 "),
        ("speckd", {"beta": -0.1}, "beta -0.1 "),
        ("speckd", {"beta": 1.1}, "beta 1.1 "),
        ("speckd", {"accept": "typical"}, "accept 'typical' .*greedy"),
        ("speckd", {"warmup_steps": -1}, "warmup_steps -1 "),
        ("adaspec", {"fraction": 0.0}, "fraction 0.0 "),
        ("adaspec", {"fraction": 1.2}, "fraction 1.2 "),
    ],
)
def test_bad_choices_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        get_gate(name, **parameters)
