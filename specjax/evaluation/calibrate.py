"""Chooses a drafter's tree by measurement: tau and round time on training prompts."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decoding
from specjax.evaluation.timing import time_fused
from specjax.generation import TrainedDrafter, collect, make_engine, start
from specjax.models.target import Target
from specjax.training.progress import progress


@dataclasses.dataclass(frozen=True)
class Trial:
    """One budget as measured: tokens per round, milliseconds per round, tokens per millisecond."""

    budget: dict
    nodes: int
    depth: int
    tau: float
    round_ms: float

    @property
    def speed(self) -> float:
        return self.tau / self.round_ms


def calibrate(
    target: Target,
    drafter: TrainedDrafter,
    budgets: Sequence[dict],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    label: str,
    slots: int = 0,
    length: int = 0,
) -> list[Trial]:
    """Measures every budget (fields of the drafter that change its tree), fastest first.

    Greedy decoding, prompt by prompt, as the benchmark does it; with the benchmark's `slots` and
    padded prompt `length` it runs the very programs that are compiled here.
    """
    trials = []
    with progress(f"calibrate {label}", len(budgets)) as advance:
        for budget in budgets:
            variant = drafter.with_budget(**budget)
            engine, params = make_engine(target, variant)
            first, rounds = None, []
            for prompt in prompts:
                state = start(engine, params, [prompt], max_new_tokens, 0, slots, length)
                first = jax.tree.map(jnp.copy, state) if first is None else first
                _, accepts = collect(decoding.run_host(engine, params, state))
                rounds += accepts[0][1:]
            round_ms = time_fused(engine, params, first, repeats=15)
            definition = variant.definition
            trials.append(
                Trial(budget, definition.nodes, definition.depth, float(np.mean(rounds)), round_ms)
            )
            advance(note=f"tau {trials[-1].tau:.2f}, {round_ms:.2f} ms")
    return sorted(trials, key=lambda t: -t.speed)
