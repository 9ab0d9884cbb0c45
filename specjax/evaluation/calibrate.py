"""Chooses a drafter's tree by measurement: tau and round time on training prompts."""

import dataclasses
from collections.abc import Sequence

from specjax.evaluation.timing import time_fused
from specjax.generation import TrainedDrafter, make_engine
from specjax.models.target import Target
from specjax.training.drafter import TauProbe
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
    probe: TauProbe,
    label: str,
) -> list[Trial]:
    """Measures every budget (fields of the drafter that change its tree), fastest first."""
    trials = []
    with progress(f"calibrate {label}", len(budgets)) as advance:
        for budget in budgets:
            variant = drafter.with_budget(**budget)
            engine, params = make_engine(target, variant)
            tau = probe(target, variant)
            round_ms = time_fused(engine, params, probe.start(engine, params, 0), repeats=15)
            definition = variant.definition
            trials.append(Trial(budget, definition.nodes, definition.depth, tau, round_ms))
            advance(note=f"tau {tau:.2f}, {round_ms:.2f} ms")
    return sorted(trials, key=lambda t: -t.speed)
