"""Verdicts on exactness: token identity at temperature 0, tests of the law above it."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax.evaluation.output_tests import (
    AnswerScores,
    OutputTest,
    combined_p,
    describe,
    divergence,
    output_tests,
)
from specjax.generation import bucket, pad_to_bucket
from specjax.models import transformer
from specjax.models.target import Target
from specjax.sampling import Sampling, filtered_probs
from specjax.sharding import fetch

TIE = 1e-4  # gap between two logits under which fp32 rounding may rank them either way


def next_logits(target: Target, prompt, new) -> np.ndarray:
    """TxV: the target's logits for each new token, by one forward without a cache."""
    ids = [*prompt, *new]
    return fetch(target.logits(pad_to_bucket([ids]))[0, len(prompt) - 1 : len(ids) - 1])


# ---- temperature 0 -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where an answer first leaves its reference.

    `gap` is the largest logit less the smaller one of the two tokens': the top-two gap, if they are
    the top two. It is infinite where one of the answers just ends (its token is None).
    """

    answer: int  # index of the pair
    position: int  # new tokens before it
    gap: float
    reference: int | None
    emitted: int | None


def divergences(target: Target, pairs) -> list[Divergence]:
    """The first divergence of every answer that differs from its reference.

    Args:
      pairs: (prompt ids, reference's new tokens, the method's new tokens) of every turn.
    """
    found = []
    for i, (prompt, reference, answer) in enumerate(pairs):
        reference, answer = list(reference), list(answer)
        if reference == answer:
            continue
        shared = list(zip(reference, answer, strict=False))
        first = next((j for j, (a, b) in enumerate(shared) if a != b), len(shared))
        tokens = [row[first] if first < len(row) else None for row in (reference, answer)]
        gap = math.inf
        if None not in tokens:
            logits_V = next_logits(target, prompt, [*reference[:first], 0])[-1]
            gap = float(np.max(logits_V) - np.min(logits_V[tokens]))
        found.append(Divergence(i, first, gap, *tokens))
    return found


def identical_verdict(target: Target, pairs, tie: float = TIE) -> dict:
    """Compares answers with vanilla's.

    Args:
      pairs: (prompt ids, vanilla's new tokens, the method's new tokens) of every turn.
      tie: gap under which rounding may pick either token.

    Returns:
      {"kind": "identical", "checked", "identical", "ties"}: a tie is an answer whose first
      divergence lies between tokens whose logits are closer to the largest one than `tie`.
    """
    return count_identical(divergences(target, pairs), len(pairs), tie)


def count_identical(parted: Sequence[Divergence], checked: int, tie: float = TIE) -> dict:
    """`identical_verdict` of the answers that parted, out of those checked."""
    ties = sum(d.gap < tie for d in parted)
    same = checked - len(parted)
    return {"kind": "identical", "checked": checked, "identical": same, "ties": ties}


def recomputed(target: Target, prompt, new) -> list[int]:
    """Greedy tokens of one forward without a cache, as far as they agree with `new` and one more.

    The slow twin of plain greedy decoding: equal to `new` if and only if every token of it is the
    first maximum of the logits recomputed from the tokens before it.
    """
    best = next_logits(target, prompt, new).argmax(-1).tolist()
    first = next((i for i, (a, b) in enumerate(zip(best, new, strict=True)) if a != b), len(new))
    return best[: first + 1]


# ---- above it ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _score(params, config, sampling: Sampling, rows: int, tokens_1xS, first, tie):
    """The fields of AnswerScores for the tokens at places first + 1 .. first + rows."""
    at_T = jnp.minimum(first + jnp.arange(rows), tokens_1xS.shape[1] - 2)
    hidden = transformer.forward(params, config, tokens_1xS).hidden_BxTxD
    logits_TxV = transformer.logits_of(params, hidden[:, at_T])[0]
    ids_V = jnp.arange(logits_TxV.shape[-1])

    def row(_, item):
        logits_V, token = item
        probs_V = filtered_probs(logits_V, sampling)
        # Rounding moves the filter's edge: a token is outside only if it stays there when raised.
        raised_V = filtered_probs(logits_V.at[token].add(tie), sampling)
        probs_V = jnp.where(probs_V[token] > 0, probs_V, raised_V)
        prob = probs_V[token]
        logp_V = jnp.where(probs_V > 0, jnp.log(jnp.where(probs_V > 0, probs_V, 1.0)), 0.0)
        mean = jnp.sum(probs_V * logp_V)
        variance = jnp.sum(probs_V * (logp_V - mean) ** 2)
        smaller_V = ids_V < token
        likelier_V = (probs_V > prob) | ((probs_V == prob) & smaller_V)
        below = jnp.sum(jnp.where(smaller_V, probs_V, 0.0))
        above = jnp.sum(jnp.where(likelier_V, probs_V, 0.0))
        return None, (logp_V[token], mean, variance, prob, below, above)

    _, scores = jax.lax.scan(row, None, (logits_TxV, tokens_1xS[0, at_T + 1]))
    return scores


def score_answers(
    target: Target, sampling: Sampling, answers, tie: float = TIE
) -> list[AnswerScores]:
    """Each answer's tokens under the target's filtered laws: one forward an answer, no cache.

    Args:
      answers: (prompt ids, new tokens) of every turn; answers without tokens are left out.
      tie: logits this close may change places by rounding, so a token counts as forbidden (its
        probability is 0) only if the filter forbids it even with its logit raised by as much; at
        temperature 0, only if it is no maximum even then.
    """
    scores = []
    for prompt, new in answers:
        if not len(new):
            continue
        fields = _score(
            target.params, target.config, sampling, bucket(len(new)),
            pad_to_bucket([[*prompt, *new]]), len(prompt) - 1, tie,
        )  # fmt: skip
        scores.append(AnswerScores(*(f[: len(new)] for f in fetch(fields))))
    return scores


def tested_answers(
    target: Target, sampling: Sampling, answers, tie: float = TIE, seed: int = 0
) -> tuple[dict, list[OutputTest]]:
    """`distribution_verdict` with the tests it is made of."""
    scores = score_answers(target, sampling, answers, tie)
    tests = output_tests(scores, seed)
    test = describe(tests, sum(len(s.prob_T) for s in scores))
    return {"kind": "distribution", "test": test, "p_value": combined_p(tests)}, tests


def distribution_verdict(
    target: Target, sampling: Sampling, answers, tie: float = TIE, seed: int = 0
) -> dict:
    """Tests whether sampled answers follow the target's law (see `output_tests`).

    Args:
      answers: (prompt ids, new tokens) of every turn: all that were decoded, however they ended.
      tie: see `score_answers`.
      seed: of the noise that makes token ids continuous; it has nothing to do with decoding's.

    Returns:
      {"kind": "distribution", "test", "p_value"}; a token that the filter forbids gives p = 0.
    """
    return tested_answers(target, sampling, answers, tie, seed)[0]


def lossy_verdict(
    target: Target, sampling: Sampling, answers: Sequence, tie: float = TIE, seed: int = 0
) -> dict:
    """How far a rule that is lossy by design strays from the target, in [0, 1].

    Above temperature 0: `output_tests.divergence`, a lower bound of the mean total variation
    between emitted and target law. At temperature 0 both laws are points and the same mean is the
    share of tokens that are not the target's greedy choice after the tokens before them (ties
    excused). `chance` is what an exact rule would show.

    Args: as `distribution_verdict`.

    Returns:
      {"kind": "lossy", "divergence", "chance", "measure"}.
    """
    scores = score_answers(target, sampling, answers, tie)
    count = sum(len(s.prob_T) for s in scores)
    if sampling.greedy:
        wrong = sum(int(np.sum(s.prob_T <= 0)) for s in scores)
        distance, chance = wrong / max(count, 1), 0.0
        measure = f"share of {count} tokens that are not the target's greedy choice"
    else:
        distance, chance = divergence(scores, seed)
        measure = f"KS distance of probability-ordered PIT values, {count} tokens"
    return {"kind": "lossy", "divergence": distance, "chance": chance, "measure": measure}
