"""Peaks, operations and traffic of programs small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest

from specjax.planning.program import trace

N = 16
BYTES = 4 * N * N


def matrix(n=N, m=N, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((n, m), dtype)


def test_one_product():
    found = trace(lambda a, b: a @ b, matrix(3, 5), matrix(5, 7, jnp.float32))
    assert found.flops == {"rounded": 2 * 3 * 5 * 7}
    with jax.default_matmul_precision("highest"):
        assert trace(lambda a: a @ a, matrix()).flops == {"float32": 2 * N**3}
    assert found.peak == 4 * 3 * 7
    assert found.traffic == 4 * (3 * 5 + 5 * 7 + 3 * 7)
    assert trace(lambda a, b: a @ b, *[matrix(dtype=jnp.bfloat16)] * 2).flops.keys() == {"bfloat16"}


def test_what_is_fused_does_not_exist():
    # Any number of elementwise steps is one array, and a sum of them none.
    assert trace(lambda a: jnp.sin(a * 2 + 1) - a.T, matrix()).peak == BYTES
    assert trace(lambda a: jnp.sum(a * 2 + 1), matrix()).peak == 4
    # What a product reads exists; what is computed from it afterwards takes its place.
    assert trace(lambda a: (a + 1) @ a, matrix()).peak == 2 * BYTES
    assert trace(lambda a: (a @ a) * 2 + 1, matrix()).peak == BYTES


def test_an_exponential_read_twice_exists():
    once = trace(lambda a: jnp.sum(jnp.exp(a)), matrix())
    twice = trace(lambda a: jax.nn.softmax(a).sum(), matrix())
    assert once.peak < BYTES <= twice.peak


def test_arrays_live_until_they_are_read_last():
    def chain(a, n):
        for _ in range(n):
            a = a @ a
        return a

    assert trace(lambda a: chain(a, 2), matrix()).peak == 2 * BYTES
    assert trace(lambda a: chain(a, 9), matrix()).peak == 2 * BYTES

    def backward(a, n):  # every a is kept for its gradient
        return jax.grad(lambda a: chain(a, n).sum())(a)

    few, many = (trace(lambda a, n=n: backward(a, n), matrix()).peak for n in (4, 8))
    assert many - few == 4 * BYTES


def test_rematerialised_arrays_are_not_kept():
    def deep(wrap, n):
        @wrap
        def block(a):
            return jnp.tanh(jnp.tanh(a @ a) @ a)

        def loss(a):
            for _ in range(n):
                a = block(a)
            return a.sum()

        return trace(jax.grad(loss), matrix()).peak

    plain = deep(lambda f: f, 8) - deep(lambda f: f, 4)
    kept = deep(jax.checkpoint, 8) - deep(jax.checkpoint, 4)
    assert kept == 4 * BYTES < plain


def test_loops_count_their_body_as_often_as_it_runs():
    def scanned(w, a):
        return jax.lax.scan(lambda x, w: (x @ w, ()), a, w)[0]

    stacked = jax.ShapeDtypeStruct((6, N, N), jnp.float32)
    found = trace(scanned, stacked, matrix())
    assert found.flops == {"rounded": 6 * 2 * N**3}
    assert found.peak < 6 * BYTES  # one slice at a time
    assert found.traffic >= 6 * BYTES


def test_given_arrays_are_written_in_place():
    def write(cache, rows):
        return jax.lax.dynamic_update_slice(cache, rows, (0, 0))

    rows = matrix(1)
    assert trace(write, matrix(), rows, donate=(0,)).peak == 0
    assert trace(write, matrix(), rows).peak == BYTES
    assert trace(write, matrix(), rows, donate=(0,)).traffic == 2 * 4 * N


def test_results_may_be_smaller_than_what_was_computed():
    whole, share = (trace(lambda a: a @ a, matrix(), out_bytes=b) for b in ((), (BYTES // 4,)))
    assert (whole.peak, share.peak) == (BYTES, BYTES // 4)


@pytest.mark.parametrize("layers", [1, 3])
def test_operations_are_those_that_xla_counts(layers):
    def loss(ws, x):
        for w in ws:
            x = x @ w
        return x.sum()

    ws, x = [matrix() for _ in range(layers)], matrix(8)
    counted = jax.jit(jax.grad(loss)).lower(ws, x).compile().cost_analysis()["flops"]
    assert sum(trace(jax.grad(loss), ws, x).flops.values()) == pytest.approx(counted, rel=0.1)
