"""The clock of a training stage, on time that is told to it."""

import pytest

from specjax.training import loop
from specjax.training.loop import Clock


class Hours:
    """Seconds that pass when told to."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def pass_by(self, seconds):
        self.seconds += seconds


@pytest.fixture
def hours():
    return Hours()


def test_rates_are_of_steps_alone_and_goodput_of_all_time(hours):
    clock = Clock(0, tokens_per_step=100, flops_per_step=3e12, peak_flops=4e12, now=hours)
    hours.pass_by(30)  # compiling
    clock.go_on()
    hours.pass_by(20)  # ten steps of two seconds
    first = clock.rates(10)
    assert first == {"tokens_per_s": 50.0, "tflops_per_s": 1.5, "mfu": 0.375, "goodput": 0.4}
    hours.pass_by(8)
    clock.pause()
    hours.pass_by(100)  # a checkpoint
    clock.go_on()
    hours.pass_by(2)
    second = clock.rates(15)  # five steps in ten seconds
    assert second["tokens_per_s"] == 50.0 and second["mfu"] == 0.375
    assert second["goodput"] == pytest.approx(30 / 160, abs=1e-4)


def test_a_resumed_stage_counts_its_own_steps(hours):
    clock = Clock(90, tokens_per_step=10, flops_per_step=0.0, now=hours)
    hours.pass_by(5)
    assert clock.rates(95) == {"tokens_per_s": 10.0, "goodput": 1.0}


def test_without_a_known_peak_there_is_no_mfu(hours):
    clock = Clock(0, tokens_per_step=1, flops_per_step=1e12, now=hours)
    hours.pass_by(1)
    assert set(clock.rates(1)) == {"tokens_per_s", "tflops_per_s", "goodput"}


def test_pausing_twice_counts_once(hours):
    clock = Clock(0, tokens_per_step=1, flops_per_step=0.0, now=hours)
    hours.pass_by(4)
    clock.pause()
    clock.pause()
    clock.go_on()
    assert clock.rates(8)["tokens_per_s"] == 2.0


def test_the_loop_leaves_compiling_checkpoints_and_evaluation_out(monkeypatch):
    """Everything that passes time in `fit` is either a step or is not."""
    import jax.numpy as jnp

    hours, rows = Hours(), []

    class State:
        step = jnp.int32(0)

    class Log:
        def rewind(self, *_):
            pass

        def write(self, stage, step, **values):
            rows.append((step, values))

    class Saved:
        def latest(self):
            return None

        def save(self, *_):
            hours.pass_by(50)

    calls = []

    def step(state, frozen, batch):
        calls.append(None)
        hours.pass_by(1000 if len(calls) == 1 else 2)
        return state, {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}

    def evaluate(state):
        hours.pass_by(70)
        return {"tau": 1.0}

    monkeypatch.setattr(loop.time, "perf_counter", hours)
    monkeypatch.setattr(Clock.__init__, "__defaults__", (0.0, hours))
    loop.fit(
        "train/x", State(), None, step, lambda *_: None, 9, checkpoints=Saved(),
        checkpoint_every=2, metrics=Log(), log_every=4, evaluate=evaluate, evaluate_every=3,
        tokens_per_step=6, flops_per_step=1.0, peak_flops=1.0,
    )  # fmt: skip
    rates = [(step, values["tokens_per_s"]) for step, values in rows if "tokens_per_s" in values]
    # The first call counts for no time here: three steps of two seconds among the first four.
    assert rates == [(4, 4.0), (8, 3.0), (9, 3.0)]
