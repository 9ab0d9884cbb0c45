"""The training loop: batches in, checkpoints, metrics and a progress line out."""

import math
import time
from collections.abc import Callable

import jax

from specjax.training.checkpoints import Checkpoints
from specjax.training.metrics import MetricsLog
from specjax.training.progress import progress, say
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
      metrics, log_every: rows of loss, gradient norm, throughput.
      evaluate, evaluate_every: state -> dict of numbers, logged as its own row (decode-time tau).
      tokens_per_step: for the throughput column.

    Raises:
      FloatingPointError: the loss or a gradient is not finite; the last good checkpoint stays.
    """
    if checkpoints is not None and checkpoints.latest() is not None:
        restored = checkpoints.restore(state, say)
        state = state if restored is None else restored
    done = int(state.step)
    if metrics is not None:
        metrics.rewind(stage, done)
    if done:
        say(f"{stage}: resuming at step {done} of {steps}")
    last, counted, pending = time.perf_counter(), done, None

    def check(step, values):
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            kept = None if checkpoints is None else checkpoints.latest()
            raise FloatingPointError(
                f"{stage}: step {step}: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}; stopped, last good checkpoint: step {kept}"
            )
        return values

    with progress(stage, steps, done) as advance:
        for step in range(done + 1, steps + 1):
            state, values = step_fn(state, frozen, batch_fn(step - 1, state))
            # Fetch step t-1 while step t runs: the device never waits for the host.
            previous = check(*pending) if pending is not None else None
            pending = (step, values)
            advance(note=f"loss {previous['loss']:.3f}" if previous else "")
            final, due = step == steps, checkpoint_every and step % checkpoint_every == 0
            if metrics is not None and (step % log_every == 0 or final):
                now_values, now = check(*pending), time.perf_counter()
                rate = tokens_per_step * (step - counted) / (now - last)
                metrics.write(stage, step, **now_values, tokens_per_s=round(rate, 1))
                last, counted = now, step
            if checkpoints is not None and (final or due):
                check(*pending)
                checkpoints.save(step, state)
                last, counted = time.perf_counter(), step
            if evaluate is not None and evaluate_every and (step % evaluate_every == 0 or final):
                results = evaluate(state)
                if metrics is not None:
                    metrics.write(stage, step, **results)
                last, counted = time.perf_counter(), step
    return state
