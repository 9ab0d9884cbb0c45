"""Numbers from records: tau, speed, speedup, acceptance by depth, and bootstrap intervals.

Every quantity is a ratio of sums over prompts (a micro-average), so a long answer weighs as much
as the tokens it has. Intervals are percentile bootstraps that resample prompts: the turns of a
question stay together, because the second turn continues the first and is no independent draw.
They cover the choice of prompts, not the noise of the clock, which the median over repeats damps.
"""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from specjax.evaluation.records import TurnRecord

Interval = tuple[float, float]


class Totals(NamedTuple):
    """Sums per question, in order of first appearance; Q is the number of questions."""

    question_ids: list
    tokens_Q: np.ndarray  # new tokens, the prefill's included
    round_tokens_Q: np.ndarray  # new tokens without the prefill's
    rounds_Q: np.ndarray
    seconds_Q: np.ndarray  # median over the timed repeats, summed over turns


def question_totals(turns: Sequence[TurnRecord]) -> Totals:
    """Sum tokens, rounds and median seconds over the turns of each question."""
    sums: dict = {}
    for turn in turns:
        tokens, rounds = len(turn.tokens), len(turn.accept_lengths) - 1
        entry = np.array([tokens, tokens - 1, rounds, median(turn.wall_times)])
        sums[turn.question_id] = sums.get(turn.question_id, 0) + entry
    return Totals(list(sums), *np.stack(list(sums.values()), axis=1))


def tau(turns: Sequence[TurnRecord]) -> float:
    """Mean tokens per round, the extra token included and the prefill left out; vanilla is 1.0.

    Raises ValueError when no turn got as far as a round.
    """
    totals = question_totals(turns)
    if not totals.rounds_Q.sum():
        raise ValueError("tau is undefined: every answer ended with the prefill's token")
    return float(totals.round_tokens_Q.sum() / totals.rounds_Q.sum())


def tokens_per_second(turns: Sequence[TurnRecord]) -> float:
    """All new tokens over all seconds, each turn at its median repeat, prefill included."""
    totals = question_totals(turns)
    return float(totals.tokens_Q.sum() / totals.seconds_Q.sum())


def speedup(turns: Sequence[TurnRecord], vanilla: Sequence[TurnRecord]) -> float:
    """Tokens per second over vanilla's on the same prompts.

    Raises ValueError when the two did not answer the same turns of the same questions.
    """
    check_paired(turns, vanilla)
    return tokens_per_second(turns) / tokens_per_second(vanilla)


def tau_interval(
    turns: Sequence[TurnRecord], resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Bootstrap interval of `tau`. Raises ValueError as `tau` does, and for resamples < 1."""
    tau(turns)
    totals = question_totals(turns)
    weights_RxQ = _bootstrap_weights(len(totals.question_ids), resamples, seed)
    rounds_R = weights_RxQ @ totals.rounds_Q
    tokens_R = weights_RxQ @ totals.round_tokens_Q
    # A resample may hold only prompts that ended in prefill: it says nothing about rounds.
    return _percentiles(tokens_R[rounds_R > 0] / rounds_R[rounds_R > 0], level)


def speedup_interval(
    turns: Sequence[TurnRecord],
    vanilla: Sequence[TurnRecord],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Bootstrap interval of `speedup`, both methods resampled with the same prompts.

    Pairing cancels what makes a prompt slow for both. Raises ValueError as `speedup` does, and for
    resamples < 1.
    """
    check_paired(turns, vanilla)
    ours, base = question_totals(turns), question_totals(vanilla)
    place = {question: index for index, question in enumerate(base.question_ids)}
    order = [place[question] for question in ours.question_ids]
    weights_RxQ = _bootstrap_weights(len(order), resamples, seed)
    speed_R = (weights_RxQ @ ours.tokens_Q) / (weights_RxQ @ ours.seconds_Q)
    base_R = (weights_RxQ @ base.tokens_Q[order]) / (weights_RxQ @ base.seconds_Q[order])
    return _percentiles(speed_R / base_R, level)


def acceptance_by_depth(turns: Sequence[TurnRecord], depth: int) -> list[float]:
    """Entry i: the share of rounds that accepted a draft token at depth i + 1 among those that
    accepted one at depth i (depth 0 is the root, always accepted).

    A round that emitted n tokens accepted n - 1 draft tokens and added the extra one, so it proves
    an acceptance at depths 1 .. n - 1 and a rejection at depth n. The last round of a turn may have
    been cut by the stop token or the length limit, and its n tokens may all be draft tokens: it is
    taken as a lower bound, proving the acceptances and no rejection (a censored observation, as in
    a Kaplan-Meier estimate). Leaving it out instead would favour short rounds, for long ones run
    into the limit more often. A draft without a token at some depth counts as rejected there.

    The list ends before the first depth that no round reached, so it may be shorter than `depth`.
    """
    accepted_N, rejected_N = np.zeros(depth), np.zeros(depth)
    for turn in turns:
        rounds = turn.accept_lengths[1:]
        for index, emitted in enumerate(rounds):
            accepted_N[: emitted - 1] += 1
            if index < len(rounds) - 1 and emitted <= depth:
                rejected_N[emitted - 1] += 1
    tried_N = accepted_N + rejected_N
    reached = int(np.argmin(tried_N)) if (tried_N == 0).any() else depth
    return [float(a / t) for a, t in zip(accepted_N[:reached], tried_N[:reached], strict=True)]


def check_paired(turns: Sequence[TurnRecord], vanilla: Sequence[TurnRecord]) -> None:
    """Raise ValueError, naming some, unless both hold the same turns of the same questions."""
    ours = {(turn.question_id, turn.turn) for turn in turns}
    base = {(turn.question_id, turn.turn) for turn in vanilla}
    if ours != base:
        some = sorted(ours ^ base, key=str)[:3]
        raise ValueError(
            f"not paired with vanilla: {len(ours - base)} turns only here, {len(base - ours)} only "
            f"there; (question, turn): {', '.join(map(str, some))}"
        )


def _bootstrap_weights(questions: int, resamples: int, seed: int) -> np.ndarray:
    """How often each question is drawn in each resample: R x Q counts, rows summing to Q."""
    if resamples < 1:
        raise ValueError(f"bootstrap resamples must be at least 1, got {resamples}")
    generator = np.random.default_rng(seed)
    return generator.multinomial(questions, np.full(questions, 1 / questions), size=resamples)


def _percentiles(values_R: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
