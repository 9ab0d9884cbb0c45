"""Timing helpers, and what this machine could do at best, measured by our own code.

Machines are noisy, so nothing here trusts one number: calls that are to be compared take turns
(A B C A B C ...), so that noise hits all of them alike, and what is reported is the median with
its quartiles.
"""

import concurrent.futures
import dataclasses
import functools
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

LARGE_BYTES = 512 * 2**20
"""An array that no last-level cache holds."""
MATMUL_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry a sample."""

    seconds: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Median milliseconds."""
        return 1e3 * float(np.median(self.seconds))

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """First and third quartile in milliseconds."""
        low, high = np.percentile(self.seconds, (25, 75))
        return 1e3 * float(low), 1e3 * float(high)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def in_a_row(call: Callable, count: int) -> Callable:
    """A function that makes `count` calls without waiting between them, as a decoding loop does."""

    def calls():
        for _ in range(count):
            result = call()
        return result

    return calls


def seconds_of(call: Callable) -> float:
    """Seconds until what the call returns is there."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def interleaved(
    calls: dict[str, Callable],
    repeats: int,
    per: int = 1,
    warmup: int = 2,
    before: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Times several callables in turns.

    Args:
      calls: name -> a function without arguments; what it returns is waited for.
      repeats: rounds over all of them, each giving every call one sample.
      per: what a sample is divided by (repetitions within one call).
      warmup: untimed rounds at the start: compilation, caches.
      before: called with the name ahead of every sample, outside the timed region.
    """
    samples = {name: [] for name in calls}
    for index in range(warmup + repeats):
        for name, call in calls.items():
            if before is not None:
                before(name)
            seconds = seconds_of(call) / per
            if index >= warmup:
                samples[name].append(seconds)
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def ratio(first: Timing, second: Timing) -> tuple[float, tuple[float, float]]:
    """Median of first / second over samples taken in the same turn, and its quartiles."""
    ratios = np.array(first.seconds) / np.array(second.seconds)
    low, high = np.percentile(ratios, (25, 75))
    return float(np.median(ratios)), (float(low), float(high))


# ---- machine limits ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Limit:
    """A rate per second and the method that reached it, the best of those tried."""

    per_second: float
    method: str


def _best(work: float, calls: dict[str, Callable], repeats: int) -> Limit:
    timings = interleaved(calls, repeats)
    name = min(timings, key=lambda name: timings[name].ms)
    return Limit(1e3 * work / timings[name].ms, name)


def bandwidth(size_bytes: int, repeats: int = 9) -> Limit:
    """Bytes per second of reading one array of `size_bytes` from start to end.

    Three readers compete: numpy's maximum with one thread per core, XLA's sum, and XLA's
    matrix-vector product with the matrix stored [in, out].
    """
    columns = 2048
    rows = max(1, size_bytes // 4 // columns)
    host_RxC = np.ones((rows, columns), np.float32)
    parts = np.array_split(host_RxC.reshape(-1), cores())
    device_RxC, ones_1xR = jnp.asarray(host_RxC), jnp.ones((1, rows))
    total, product = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    calls = {
        "XLA sum": lambda: total(device_RxC),
        "XLA vector x matrix": lambda: product(ones_1xR, device_RxC),
    }
    with concurrent.futures.ThreadPoolExecutor(cores()) as threads:
        if jax.default_backend() == "cpu":
            calls[f"numpy max, {cores()} threads"] = lambda: list(threads.map(np.max, parts))
        return _best(host_RxC.nbytes, calls, repeats)


def matmul_throughput(size: int = MATMUL_SIZE, repeats: int = 5) -> Limit:
    """Floating-point operations per second of a large square float32 product."""
    host = np.random.default_rng(0).standard_normal((size, size), np.float32)
    device = jnp.asarray(host)
    with jax.default_matmul_precision("highest"):
        product = jax.jit(jnp.matmul)
        calls = {"XLA": lambda: product(device, device)}
        if jax.default_backend() == "cpu":
            calls["numpy"] = lambda: host @ host
        return _best(2.0 * size**3, calls, repeats)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The limits that floors are computed from."""

    large: Limit  # reading LARGE_BYTES
    weights: Limit  # reading an array of the model's weight size, again and again
    matmul: Limit

    def floor_ms(self, bytes_read: float, flops: float) -> float:
        """The least time for reading that much and computing that much, perfectly overlapped."""
        return 1e3 * max(bytes_read / self.weights.per_second, flops / self.matmul.per_second)


@functools.cache
def measure_machine(weight_bytes: int) -> Machine:
    """Measures this machine's limits for a model of `weight_bytes`."""
    return Machine(bandwidth(LARGE_BYTES), bandwidth(weight_bytes), matmul_throughput())
