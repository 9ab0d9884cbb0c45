"""Tests of emitted tokens against the law that they should follow, in NumPy.

Input are the target's own conditional laws along each answer (one teacher-forced forward); nothing
is decoded again. If decoding is lossless, each token is a draw from its law given all tokens before
it, and two things follow, whatever the laws are:

* log p(x_t) + H_t, the log-probability less its conditional mean, is a martingale difference with a
  known conditional variance;
* the randomised probability integral transform u_t = F(x_t - 1) + v_t p(x_t), with v_t uniform and
  independent of decoding, is uniform on [0, 1) given the past, hence independent of it (Rosenblatt
  1952; Brockwell 2007 for discrete laws). It holds for every order of the vocabulary that F may sum
  in. Two are tested: token ids, the order in which inversion maps noise to tokens, so that noise
  used twice shows; and falling probability, in which every sharpening, flattening or narrower
  filter pushes all u_t the same way instead of averaging out.

Answers may end at a stop token or a length limit: both are decided by tokens already seen, so
lengths are stopping times. Sums of martingale differences keep mean zero and stay normal when
scaled by their predictable variance. Laid end to end, the u_t of all answers are one independent
uniform sequence, cut at a stopping time; the empirical process then keeps its mean, and the
Kolmogorov-Smirnov statistic its limit law (Anscombe 1952). Dropping answers by how they ended would
break all of this: give every answer that was decoded.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LAGS = 8  # tokens (and answers) looked back for repeated noise; more than one round emits


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerScores:
    """One answer under the target's filtered laws; T is its number of new tokens."""

    logp_T: np.ndarray  # log p(x_t); meaningless where prob is 0
    mean_T: np.ndarray  # E[log p] = -H_t
    variance_T: np.ndarray  # Var[log p]
    prob_T: np.ndarray  # p(x_t); 0 for a token that the filter forbids
    below_T: np.ndarray  # mass of the tokens with smaller ids
    above_T: np.ndarray  # mass of the more probable tokens, ties by id


@dataclasses.dataclass(frozen=True)
class OutputTest:
    """One test's outcome; `meaning` says in words what it means if it fails."""

    name: str
    symbol: str
    statistic: float
    p_value: float
    meaning: str


def pit_values(answers: Sequence[AnswerScores], seed: int = 0):
    """(by id, by falling probability): the randomised PIT values of each answer, lists of [T].

    A forbidden token gets the value 1 in the second list: past all the law's mass.
    """
    noise = np.random.default_rng([seed, 0x717])
    ids, ranks = [], []
    for a in answers:
        share_T = noise.random(len(a.prob_T)) * a.prob_T
        ids.append(np.clip(a.below_T + share_T, 0.0, 1.0))
        ranks.append(np.clip(a.above_T + share_T, 0.0, 1.0))
    return ids, ranks


def martingale_test(answers: Sequence[AnswerScores]) -> OutputTest:
    """Two-sided z-test of the sum of log p(x_t) + H_t over its predictable variance."""
    allowed = [a.prob_T > 0 for a in answers]
    parts = list(zip(answers, allowed, strict=True))
    total = sum(float(np.sum((a.logp_T - a.mean_T)[ok], dtype=np.float64)) for a, ok in parts)
    variance = sum(float(np.sum(a.variance_T[ok], dtype=np.float64)) for a, ok in parts)
    count = max(1, sum(int(ok.sum()) for ok in allowed))
    z = total / math.sqrt(variance) if variance > 0 else 0.0
    nats = abs(total) / count
    if z > 0:
        more, so = "more", "the rule sharpens the law"
    else:
        more, so = "less", "the rule flattens the law, or lets through what the drafter prefers"
    meaning = (
        f"the emitted tokens are {more} probable than the target's own samples would be, by "
        f"{nats:.3g} nats each: {so}"
    )
    p_value = math.erfc(abs(z) / math.sqrt(2))
    return OutputTest("log-probability", "z", z, p_value, meaning)


def uniformity_tests(ids, ranks) -> tuple[OutputTest, OutputTest]:
    """Kolmogorov-Smirnov tests of the PIT values in both orders of the vocabulary."""
    by_id, by_rank = np.concatenate(ids), np.concatenate(ranks)
    result = stats.kstest(by_id, "uniform")
    meaning = (
        "the emitted tokens do not follow the target's law: over token ids in order the shares "
        f"differ by {result.statistic:.3f}"
    )
    first = OutputTest("PIT by id", "D", float(result.statistic), float(result.pvalue), meaning)
    result = stats.kstest(by_rank, "uniform")
    # statistic_sign is +1 where the empirical distribution lies above the uniform one.
    side = "many" if result.statistic_sign > 0 else "few"
    meaning = (
        f"too {side} of the emitted tokens are among the target's most probable ones: the shares "
        f"differ by {result.statistic:.3f}, a lower bound (but for chance) of the mean total "
        "variation"
    )
    name = "PIT by probability"
    return first, OutputTest(name, "D", float(result.statistic), float(result.pvalue), meaning)


def _dependence_test(name: str, meaning: str, pairs_by_lag) -> OutputTest:
    """Sum over lags of squared z-scores of sum now * past, chi-square under independence.

    The products are martingale differences with predictable variance past^2 / 12, and those of
    different lags are uncorrelated.
    """
    scores, correlations = [], []
    for now, past in pairs_by_lag:
        spread = math.sqrt(float(np.sum(past**2)) / 12)
        if spread > 0:
            product = float(np.sum(now * past))
            scores.append(product / spread)
            correlations.append(product / max(float(np.sum(past**2)), 1e-30))
    if not scores:
        return OutputTest(name, "Q", 0.0, 1.0, "")
    strongest = int(np.argmax(np.abs(scores)))
    meaning += f" (strongest {strongest + 1} back, correlation {correlations[strongest]:+.2f})"
    total = float(np.sum(np.square(scores)))
    return OutputTest(name, "Q", total, float(stats.chi2.sf(total, len(scores))), meaning)


def token_dependence_test(ids) -> OutputTest:
    """Correlation of the PIT values with those 1 to 8 tokens earlier in the same answer."""
    centred = [u_T - 0.5 for u_T in ids]
    pairs = [
        [np.concatenate(side) for side in zip(*((d[k:], d[:-k]) for d in centred), strict=True)]
        for k in range(1, LAGS + 1)
        if centred
    ]
    meaning = (
        "tokens fall into their laws as the tokens before them did: noise is used again between "
        "steps, or what was accepted decides what is accepted next"
    )
    return _dependence_test("PIT between tokens", meaning, pairs)


def answer_dependence_test(ids) -> OutputTest:
    """Correlation of the PIT values with those at the same place of the 1 to 8 answers before."""
    centred = [u_T - 0.5 for u_T in ids]
    pairs = []
    for k in range(1, min(LAGS + 1, len(centred))):
        cut = [
            (now[: len(past)], past[: len(now)])
            for now, past in zip(centred[k:], centred[:-k], strict=True)
        ]
        pairs.append([np.concatenate(side) for side in zip(*cut, strict=True)])
    meaning = "answers depend on the noise of other answers: requests share their noise"
    return _dependence_test("PIT between answers", meaning, pairs)


def output_tests(answers: Sequence[AnswerScores], seed: int = 0) -> list[OutputTest]:
    """Every test, each valid on its own; `seed` is of the noise v_t alone.

    A token outside the filter is impossible, no matter of chance: one more test then fails with
    p = 0.

    Raises:
      ValueError: no token at all.
    """
    if not sum(len(a.prob_T) for a in answers):
        raise ValueError("answers: there is no token to test")
    ids, ranks = pit_values(answers, seed)
    tests = [
        martingale_test(answers),
        *uniformity_tests(ids, ranks),
        token_dependence_test(ids),
        answer_dependence_test(ids),
    ]
    outside = [np.flatnonzero(a.prob_T <= 0) for a in answers]
    count = sum(map(len, outside))
    if count:
        i = next(i for i, places in enumerate(outside) if len(places))
        meaning = (
            f"{count} emitted tokens lie outside the filter (the first in answer {i}, new token "
            f"{outside[i][0]}): what is emitted is drawn from an unfiltered law"
        )
        tests.append(OutputTest("filter", "outside", count, 0.0, meaning))
    return tests


def combined_p(tests: Sequence[OutputTest]) -> float:
    """One p-value for all: the smallest, times their number (Bonferroni; Holm's first step)."""
    return min(1.0, len(tests) * min(t.p_value for t in tests))


def describe(tests: Sequence[OutputTest], tokens: int) -> str:
    """The tests and their p-values in one line."""
    parts = [f"{t.name} {t.symbol} = {t.statistic:.3g}, p = {t.p_value:.2g}" for t in tests]
    return f"{len(tests)} tests of {tokens} tokens, Bonferroni: {'; '.join(parts)}"


def divergence(answers: Sequence[AnswerScores], seed: int = 0) -> tuple[float, float]:
    """(distance from the target's law, what it is for an exact rule by chance).

    The Kolmogorov-Smirnov distance of the PIT values by falling probability. As each value is one
    random function of (token, law), it never exceeds, but for chance, the total variation between
    emitted and target law, averaged over the places that decoding visits: 0 is lossless, 1 is as
    far as can be. With N tokens chance alone makes it 0.87 / sqrt(N).
    """
    u_N = np.concatenate(pit_values(answers, seed)[1])
    if not len(u_N):
        return 0.0, 0.0
    chance = math.sqrt(math.pi / 2) * math.log(2) / math.sqrt(len(u_N))
    return float(stats.kstest(u_N, "uniform").statistic), chance
