"""The training loop: batches in, checkpoints, metrics and a progress line out."""

import math
import time
from collections.abc import Callable

import jax

from specjax import processes
from specjax.preemption import due as due_to_stop
from specjax.preemption import noticing, stop
from specjax.profiling import StageTrace
from specjax.progress import progress, say
from specjax.training.checkpoints import Checkpoints
from specjax.training.metrics import MetricsLog
from specjax.training.state import TrainState


def fit(
    stage: str,
    state: TrainState,
    frozen,
    step_fn: Callable,
    batch_fn: Callable,
    steps: int,
    *,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 0,
    metrics: MetricsLog | None = None,
    log_every: int = 10,
    evaluate: Callable | None = None,
    evaluate_every: int = 0,
    tokens_per_step: int = 0,
    flops_per_step: float = 0.0,
    peak_flops: float = 0.0,
) -> TrainState:
    """Trains until `steps`, resuming from the newest checkpoint there is.

    Args:
      stage: name in metrics rows and on the progress line, e.g. "train/fasteagle".
      state: initial state, already placed on its mesh.
      frozen: passed to the step untouched (e.g. the target's parameters).
      step_fn: (state, frozen, batch) -> (state, metrics), see `state.make_step`.
      batch_fn: (step, state before it) -> batch; a pure function of both, so that a resumed run
        sees the same data as an uninterrupted one. The state is read there and not kept.
      steps: budget in optimisation steps.
      checkpoints, checkpoint_every: where and how often (0: only at the end).
      metrics, log_every: rows of loss, gradient norm, throughput (see `Clock`).
      evaluate, evaluate_every: state -> dict of numbers, logged as its own row (decode-time tau).
      tokens_per_step, flops_per_step, peak_flops: for throughput and MFU; the last is what all
        devices can do in a second, 0 where unknown.

    Raises:
      FloatingPointError: the loss or a gradient is not finite; the last good checkpoint stays.
      ValueError: there are checkpoints and none loads; they and the metrics stay as they are.
      Preempted: SIGTERM came; the step under way was finished and saved.
    """
    if checkpoints is not None and checkpoints.latest() is not None:
        state = checkpoints.restore(state, say)
    done = int(state.step)
    if metrics is not None:
        processes.together(lambda: metrics.rewind(stage, done))
    if done:
        say(f"{stage}: resuming at step {done} of {steps}")
    clock = Clock(done, tokens_per_step, flops_per_step, peak_flops)
    trace, pending = StageTrace(stage), None

    def check(step, values):
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            kept = None if checkpoints is None else checkpoints.latest()
            raise FloatingPointError(
                f"{stage}: step {step}: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}; stopped, last good checkpoint: step {kept}"
            )
        return values

    with progress(stage, steps, done) as advance, noticing():
        for step in range(done + 1, steps + 1):
            trace()
            state, values = step_fn(state, frozen, batch_fn(step - 1, state))
            if step == done + 1:
                clock.go_on()  # that call compiled, which is no step's time
            # Fetch step t-1 while step t runs: the device never waits for the host.
            previous = check(*pending) if pending is not None else None
            pending = (step, values)
            advance(note=f"loss {previous['loss']:.3f}" if previous else "")
            stopping = due_to_stop()
            final, due = step == steps, checkpoint_every and step % checkpoint_every == 0
            if metrics is not None and (step % log_every == 0 or final):
                values = check(*pending)
                metrics.write(stage, step, **values, **clock.rates(step))
            if checkpoints is not None and (final or due or stopping):
                check(*pending)
                clock.pause()
                checkpoints.save(step, state)
                clock.go_on()
            if stopping and not final:
                trace.close()
                saved = "nothing was saved" if checkpoints is None else f"saved at step {step}"
                stop(f"{stage}: stopped by SIGTERM, {saved}; the same command resumes")
            if evaluate is not None and evaluate_every and (step % evaluate_every == 0 or final):
                jax.block_until_ready(state.step)
                clock.pause()
                results = evaluate(state)
                if metrics is not None:
                    metrics.write(stage, step, **results)
                clock.go_on()
    trace.close()
    return state


class Clock:
    """Throughput of a training stage, and how much of the time it takes goes into steps.

    Args:
      done: steps done before.
      tokens_per_step, flops_per_step, peak_flops: see `fit`.
      now: seconds since anything.
    """

    def __init__(
        self,
        done: int,
        tokens_per_step: int,
        flops_per_step: float,
        peak_flops: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.tokens, self.flops, self.peak = tokens_per_step, flops_per_step, peak_flops
        self.now = now
        self.began = self.last = now()
        self.stepping, self.own, self.own_seconds = 0.0, done, 0.0

    def pause(self) -> None:
        """Ahead of work that is not a step."""
        now = self.now()
        self.stepping += now - self.last
        self.own_seconds += now - self.last
        self.last = now

    def go_on(self) -> None:
        """After it."""
        self.last = self.now()

    def rates(self, step: int) -> dict[str, float]:
        """Since the last call, other work left out: tokens per second, TFLOP/s (of
        `flops_per_step`), and their share of the devices' peak, `mfu`, where that is known; since
        the stage began, `goodput`: the share of its time, compilation, checkpoints and evaluation
        included, that went into steps.
        """
        self.pause()
        steps, seconds = step - self.own, max(self.own_seconds, 1e-9)
        self.own, self.own_seconds = step, 0.0
        found = {"tokens_per_s": round(self.tokens * steps / seconds, 1)}
        if self.flops:
            rate = self.flops * steps / seconds
            found["tflops_per_s"] = round(rate / 1e12, 4)
            if self.peak:
                found["mfu"] = round(rate / self.peak, 4)
        found["goodput"] = round(self.stepping / max(self.last - self.began, 1e-9), 4)
        return found
