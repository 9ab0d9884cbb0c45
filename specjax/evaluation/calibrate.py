"""Chooses a drafter's tree by measurement: tau and round time on training prompts."""

import dataclasses
from collections.abc import Sequence

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
) -> list[Trial]:
    """Measures every budget (fields of the drafter that change its tree), fastest first.

    tau comes from greedy decoding of all prompts in one batch (acceptance does not depend on the
    batch), round time from batch 1, the setting of the benchmark.
    """
    trials = []
    with progress(f"calibrate {label}", len(budgets)) as advance:
        for budget in budgets:
            variant = drafter.with_budget(**budget)
            engine, params = make_engine(target, variant, stop_tokens=())
            state = start(engine, params, list(prompts), max_new_tokens, slots=slots)
            _, accepts = collect(decoding.run_host(engine, params, state))
            rounds = [count for row in accepts for count in row[1:]]
            single = start(engine, params, list(prompts[:1]), max_new_tokens, slots=slots)
            round_ms = time_fused(engine, params, single, repeats=15)
            definition = variant.definition
            trials.append(
                Trial(budget, definition.nodes, definition.depth, float(np.mean(rounds)), round_ms)
            )
            advance(note=f"tau {trials[-1].tau:.2f}, {round_ms:.2f} ms")
    return sorted(trials, key=lambda t: -t.speed)
