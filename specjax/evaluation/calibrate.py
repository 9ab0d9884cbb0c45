"""Chooses a drafter's tree by measurement: tau and round time on training prompts."""

import dataclasses
from collections.abc import Sequence

from specjax import processes
from specjax.evaluation.timing import time_in_turns
from specjax.generation import make_engine
from specjax.models.target import Target
from specjax.progress import progress
from specjax.trained import TrainedDrafter
from specjax.training.drafter import TauProbe


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
    variants = [drafter.with_budget(**budget) for budget in budgets]
    contenders, taus = [], []
    with progress(f"calibrate {label}", len(budgets)) as advance:
        for variant in variants:
            engine, params = make_engine(target, variant)
            taus.append(probe(target, variant))
            contenders.append((engine, params, probe.start(engine, params, 0)))
            advance(note=f"tau {taus[-1]:.2f}")
    clocks = time_in_turns(contenders, repeats=15)
    times = processes.first(lambda: clocks)  # one choice of tree for all processes
    trials = [
        Trial(budget, variant.definition.nodes, variant.definition.depth, tau, round_ms)
        for budget, variant, tau, round_ms in zip(budgets, variants, taus, times, strict=True)
    ]
    return sorted(trials, key=lambda t: -t.speed)
