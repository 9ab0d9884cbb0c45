"""The tests of emitted tokens: their size on exact samples, and every planted fault caught.

Answers are simulated in NumPy from toy laws; only the last tests use a target.
"""

import dataclasses

import numpy as np
import pytest
from laws import filtered
from scipy.stats import kstest
from toys import PROMPTS, greedy_continuations, toy_target

from specjax.evaluation import lossless, output_tests
from specjax.evaluation.lossless import (
    distribution_verdict,
    divergences,
    identical_verdict,
    lossy_verdict,
    recomputed,
    score_answers,
)
from specjax.evaluation.output_tests import AnswerScores, combined_p
from specjax.sampling import Sampling

V = 12
NAMES = (
    "log-probability", "PIT by id", "PIT by probability", "PIT between tokens",
    "PIT between answers",
)  # fmt: skip


class Toy:
    """A model whose next token depends on the last one: logits_VxV, filtered laws_VxV."""

    def __init__(self, seed=0, sampling=None, scale=2.0):
        self.logits = scale * np.random.default_rng(seed).normal(size=(V, V))
        self.laws = self.filtered(sampling or Sampling(1.0))

    def filtered(self, sampling):
        return np.stack([filtered(row, sampling) for row in self.logits])

    def sample(self, rng, answers, length, laws=None, stop=None, uniforms=None):
        """Token rows drawn from `laws` (default: the model's own), cut after `stop`."""
        cumulative = np.cumsum(self.laws if laws is None else laws, axis=1)
        tokens = np.zeros((answers, length + 1), int)
        uniforms = rng.random((answers, length)) if uniforms is None else uniforms
        for t in range(length):
            past = cumulative[tokens[:, t]]
            tokens[:, t + 1] = (past <= uniforms[:, t, None] * past[:, -1:]).sum(1)
        return [cut(row, stop) for row in tokens.tolist()]

    def scores(self, rows):
        """AnswerScores of rows that start with the token 0 of the prompt."""
        return [scores_of(self.laws[row[:-1]], row[1:]) for row in rows]


def cut(row, stop):
    """The row up to the first `stop` after the prompt's token."""
    return row[: row.index(stop, 1) + 1] if stop is not None and stop in row[1:] else row


def scores_of(laws_TxV, tokens_T):
    """AnswerScores from the definitions."""
    laws, tokens = np.asarray(laws_TxV), np.asarray(tokens_T)
    at, ids = np.arange(len(tokens)), np.arange(laws.shape[1])
    logs = np.where(laws > 0, np.log(np.where(laws > 0, laws, 1)), 0)
    prob = laws[at, tokens]
    mean = (laws * logs).sum(1)
    variance = (laws * (logs - mean[:, None]) ** 2).sum(1)
    below = np.where(ids < tokens[:, None], laws, 0).sum(1)
    order = np.argsort(-laws, axis=1, kind="stable")
    rank = np.argmax(order == tokens[:, None], axis=1)
    ordered = np.take_along_axis(laws, order, axis=1)
    above = np.array([row[:r].sum() for row, r in zip(ordered, rank, strict=True)])
    return AnswerScores(logs[at, tokens], mean, variance, prob, below, above)


def outcome(toy, rows, seed=0):
    """{name: test}, combined p."""
    tests = output_tests.output_tests(toy.scores(rows), seed)
    return {t.name: t for t in tests}, combined_p(tests)


# ---- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "stop"),
    [(Sampling(0.6, 8, 0.9), None), (Sampling(1.0), 0), (Sampling(1.0), 7)],
    ids=["filtered", "stops at the first id", "stops at another"],
)
def test_exact_samples_are_refused_as_rarely_as_promised(sampling, stop):
    toy, rng, runs = Toy(1, sampling), np.random.default_rng(11), 300
    p_values = {name: [] for name in NAMES}
    combined = []
    for run in range(runs):
        tests, p = outcome(toy, toy.sample(rng, 16, 32, stop=stop), run)
        combined.append(p)
        for name in NAMES:
            p_values[name].append(tests[name].p_value)
    for name in NAMES:
        assert kstest(p_values[name], "uniform").pvalue > 1e-3, name
    # Bonferroni: at most the level, up to three standard errors of 300 runs.
    for level in (0.01, 0.05, 0.2):
        slack = 3 * np.sqrt(level * (1 - level) / runs)
        assert np.mean(np.array(combined) < level) <= level + slack


def test_longer_answers_keep_the_size_at_a_low_temperature():
    # Skewed increments: rare tokens cost many nats.
    toy, rng = Toy(2, Sampling(0.3)), np.random.default_rng(6)
    p = [outcome(toy, toy.sample(rng, 24, 64), run)[1] for run in range(100)]
    assert np.mean(np.array(p) < 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


def test_the_noise_of_the_transform_is_its_own_and_repeatable():
    toy = Toy(3)
    scores = toy.scores(toy.sample(np.random.default_rng(0), 4, 20))
    first, again = (np.concatenate(output_tests.pit_values(scores)[0]) for _ in range(2))
    other = np.concatenate(output_tests.pit_values(scores, 1)[0])
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.all((first >= 0) & (first <= 1))


# ---- power ---------------------------------------------------------------------------------------

ANSWERS, LENGTH = 24, 64


def draw(toy, rng, laws=None, **kwargs):
    return toy.sample(rng, ANSWERS, LENGTH, laws, **kwargs)


def test_a_wrong_temperature_is_caught_and_its_direction_named():
    toy = Toy(4, Sampling(1.0))
    for temperature, word in ((0.8, "sharpens"), (1.25, "flattens")):
        rows = draw(toy, np.random.default_rng(1), toy.filtered(Sampling(temperature)))
        tests, p = outcome(toy, rows)
        assert p < 1e-4
        assert tests["log-probability"].p_value < 1e-4
        assert word in tests["log-probability"].meaning
        many = "too many" if temperature < 1 else "too few"
        assert many in tests["PIT by probability"].meaning


def test_the_order_by_probability_sees_what_the_order_by_id_averages_out():
    toy = Toy(4, Sampling(1.0))
    tests, _ = outcome(toy, draw(toy, np.random.default_rng(1), toy.filtered(Sampling(0.8))))
    assert tests["PIT by probability"].p_value < 1e-3 * tests["PIT by id"].p_value


def test_a_missing_top_p_leaves_the_filter():
    toy = Toy(5, Sampling(1.0, 0, 0.8))
    tests, p = outcome(toy, draw(toy, np.random.default_rng(2), toy.filtered(Sampling(1.0))))
    assert p == 0 and "outside the filter" in tests["filter"].meaning


def test_a_narrower_filter_than_asked_for_is_caught():
    toy = Toy(5, Sampling(1.0))
    rows = draw(toy, np.random.default_rng(2), toy.filtered(Sampling(1.0, 0, 0.9)))
    tests, p = outcome(toy, rows)
    assert p < 1e-4 and tests["PIT by probability"].p_value < 1e-4 and "filter" not in tests


def test_greedy_tokens_are_caught():
    toy = Toy(6)
    tests, p = outcome(toy, draw(toy, np.random.default_rng(3), np.eye(V)[toy.laws.argmax(1)]))
    assert p < 1e-10 and "sharpens" in tests["log-probability"].meaning


@pytest.mark.parametrize("period", [1, 2, 3])
def test_noise_used_again_between_steps_is_caught(period):
    toy, rng = Toy(7), np.random.default_rng(4)
    fresh = rng.random((ANSWERS, LENGTH // period + 1))
    tests, p = outcome(toy, draw(toy, rng, uniforms=np.repeat(fresh, period + 1, axis=1)))
    assert p < 1e-4 and tests["PIT between tokens"].p_value < 1e-4
    assert "between steps" in tests["PIT between tokens"].meaning


def test_noise_shared_between_requests_is_caught():
    toy, rng = Toy(8, scale=1.0), np.random.default_rng(5)
    rows = draw(toy, rng, uniforms=np.repeat(rng.random((1, LENGTH)), ANSWERS, axis=0))
    for i, row in enumerate(rows):  # equal noise and prompts would give equal answers
        row[0] = i % V
    uniforms = rng.random(LENGTH)
    for row in rows:
        for t in range(LENGTH):
            row[t + 1] = int((np.cumsum(toy.laws[row[t]]) <= uniforms[t]).sum())
    tests, p = outcome(toy, rows)
    assert p < 1e-4 and tests["PIT between answers"].p_value < 1e-4
    assert "requests share" in tests["PIT between answers"].meaning


def test_one_token_outside_the_filter_is_enough():
    toy = Toy(9, Sampling(1.0, 4))
    rows = draw(toy, np.random.default_rng(6))
    assert outcome(toy, rows)[1] > 0.01
    rows[3][17] = int(np.argmin(toy.laws[rows[3][16]]))
    tests, p = outcome(toy, rows)
    assert p == 0 and "answer 3, new token 16" in tests["filter"].meaning


def test_divergence_bounds_the_mean_total_variation():
    toy, rng = Toy(10), np.random.default_rng(7)
    distance, chance = output_tests.divergence(toy.scores(draw(toy, rng)))
    assert 0 < distance < 2.5 * chance
    for temperature in (0.5, 0.8):
        laws = toy.filtered(Sampling(temperature))
        rows = draw(toy, rng, laws)
        visited = np.concatenate([row[:-1] for row in rows])
        variation = 0.5 * np.abs(laws - toy.laws).sum(1)[visited].mean()
        distance, chance = output_tests.divergence(toy.scores(rows))
        assert 0.5 * variation < distance < variation + 2.5 * chance


def test_no_tokens_are_no_evidence():
    with pytest.raises(ValueError, match="no token"):
        output_tests.output_tests([])
    toy = Toy(0)
    _, p = outcome(toy, [[0, 5]])  # a single token: nothing to correlate
    assert 0 < p <= 1


# ---- against a target ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    return toy_target()


def sampled_answers(toy, sampling, count, seed=0, laws=lambda p: p):
    """Answers drawn token by token from the target's full forwards, in NumPy."""
    rng, width = np.random.default_rng(seed), 32
    prompts = [[i % V, (5 * i) % V, (7 * i + 1) % V] for i in range(count)]
    tokens = np.zeros((count, width), int)
    tokens[:, :3] = prompts
    for t in range(3, 3 + 24):
        logits = np.asarray(toy.logits(tokens))[:, t - 1]
        for row, one in zip(tokens, logits, strict=True):
            row[t] = rng.choice(V, p=laws(filtered(one, sampling)))
    return [(p, row[3:27].tolist()) for p, row in zip(prompts, tokens, strict=True)]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 6, 0.9)])
def test_scores_equal_the_slow_ones(toy, sampling):
    answers = sampled_answers(toy, sampling, 3)
    for (prompt, new), fast in zip(answers, score_answers(toy, sampling, answers), strict=True):
        ids = [*prompt, *new]
        logits = np.asarray(toy.logits([ids]))[0, len(prompt) - 1 : -1]
        slow = scores_of([filtered(row, sampling) for row in logits], new)
        for field in dataclasses.fields(AnswerScores):
            np.testing.assert_allclose(
                getattr(fast, field.name), getattr(slow, field.name), atol=2e-5
            )


def test_a_distribution_verdict_tells_right_from_wrong(toy):
    sampling = Sampling(1.0, 0, 0.95)
    good = distribution_verdict(toy, sampling, sampled_answers(toy, sampling, 20))
    assert good["kind"] == "distribution" and good["p_value"] > 0.01
    assert all(name in good["test"] for name in NAMES)
    sharper = sampled_answers(toy, sampling, 20, laws=lambda p: p**2 / (p**2).sum())
    assert distribution_verdict(toy, sampling, sharper)["p_value"] < 1e-3
    unfiltered = sampled_answers(toy, Sampling(1.0), 20)
    assert distribution_verdict(toy, sampling, unfiltered)["p_value"] == 0


def test_lossy_verdicts_measure_the_distance(toy):
    sampling = Sampling(1.0)
    exact = lossy_verdict(toy, sampling, sampled_answers(toy, sampling, 20))
    sharper = sampled_answers(toy, sampling, 20, laws=lambda p: p**2 / (p**2).sum())
    strayed = lossy_verdict(toy, sampling, sharper)
    assert exact["kind"] == strayed["kind"] == "lossy"
    assert exact["divergence"] < 2.5 * exact["chance"] < strayed["divergence"] <= 1
    greedy = greedy_continuations(toy, PROMPTS, 10)
    answers = [(p, list(g)) for p, g in zip(PROMPTS, greedy, strict=True)]
    assert lossy_verdict(toy, Sampling(), answers)["divergence"] == 0
    answers[0][1][9] = (answers[0][1][9] + 1) % V
    assert lossy_verdict(toy, Sampling(), answers)["divergence"] == pytest.approx(1 / 40)


def test_divergences_ties_and_cut_answers(toy):
    greedy = greedy_continuations(toy, PROMPTS, 8)
    assert [recomputed(toy, p, g) for p, g in zip(PROMPTS, greedy, strict=True)] == greedy
    wrong = [list(g) for g in greedy]
    wrong[1][5] = (wrong[1][5] + 1) % V
    wrong[2] = wrong[2][:4]
    triples = list(zip(PROMPTS, greedy, wrong, strict=True))
    swapped, short = divergences(toy, triples)
    assert (swapped.answer, swapped.position) == (1, 5)
    assert (swapped.reference, swapped.emitted) == (greedy[1][5], wrong[1][5])
    logits = lossless.next_logits(toy, PROMPTS[1], greedy[1])[5]
    assert swapped.gap == pytest.approx(logits.max() - logits[wrong[1][5]], abs=1e-4)
    assert (short.answer, short.position, short.emitted) == (2, 4, None) and short.gap == np.inf
    counts = {"kind": "identical", "checked": 4, "identical": 2}
    assert identical_verdict(toy, triples) == counts | {"ties": 0}
    assert identical_verdict(toy, triples, tie=1e3) == counts | {"ties": 1}
    assert recomputed(toy, PROMPTS[1], wrong[1]) == greedy[1][:6]
