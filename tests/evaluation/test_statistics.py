"""Statistics against hand counts, slow loops and simulations whose truth is known."""

import random

import numpy as np
import pytest

from specjax.evaluation import statistics


def test_tau_by_hand(make_turn):
    # Rounds emit 3, 2 and 4, 1, 1: eleven tokens in five rounds, whatever the prefill did.
    turns = [make_turn("a", (1, 3, 2)), make_turn("b", (1, 4, 1, 1))]
    assert statistics.tau(turns) == pytest.approx(11 / 5)


def test_vanilla_tau_is_exactly_one(make_turn):
    turns = [make_turn(question, (1,) * (3 + 7 * question)) for question in range(9)]
    assert statistics.tau(turns) == 1.0
    assert statistics.tau_interval(turns) == (1.0, 1.0)


def test_tau_without_a_round_is_an_error(make_turn):
    with pytest.raises(ValueError, match="undefined"):
        statistics.tau([make_turn("a", (1,))])


def test_tau_interval_survives_prompts_that_end_in_prefill(make_turn):
    turns = [make_turn("a", (1,)), make_turn("b", (1, 3, 3))]
    assert statistics.tau_interval(turns, resamples=200) == (3.0, 3.0)


def test_speed_takes_the_median_repeat(make_turn):
    turns = [make_turn("a", (1, 3), seconds=(1.0, 90.0, 3.0)), make_turn("b", (1, 1), (1.0,))]
    assert statistics.tokens_per_second(turns) == pytest.approx(6 / 4)


@pytest.mark.parametrize("seed", range(5))
def test_speedup_ignores_the_order_of_prompts(simulate, seed):
    generator = np.random.default_rng(seed)
    ours, vanilla = (simulate(generator, shares, turns=2) for shares in ([0.7, 0.5], []))
    shuffled = random.Random(seed).sample(vanilla, len(vanilla))
    interval = statistics.speedup_interval(ours, vanilla, resamples=200)
    assert statistics.speedup(ours, shuffled) == pytest.approx(statistics.speedup(ours, vanilla))
    assert statistics.speedup_interval(ours, shuffled, resamples=200) == pytest.approx(interval)
    assert interval[0] < statistics.speedup(ours, vanilla) < interval[1]


def test_pairing_cancels_what_makes_a_prompt_slow(make_turn):
    generator = np.random.default_rng(0)
    seconds = np.exp(2 * generator.normal(size=20))
    ours, vanilla = (
        [make_turn(n, (1,) * (n + 2), seconds=(slower * t,)) for n, t in enumerate(seconds)]
        for slower in (1, 2)
    )
    # Vanilla in another order, with answers of many lengths: pairing goes by question, not place.
    assert statistics.speedup_interval(ours, vanilla[::-1]) == pytest.approx((2.0, 2.0))


def test_speedup_wants_the_same_prompts_and_turns(make_turn):
    ours = [make_turn("a"), make_turn("b")]
    for vanilla in ([make_turn("a")], [make_turn("a"), make_turn("b", turn=1)]):
        with pytest.raises(ValueError, match=r"\('b', 0\)"):
            statistics.speedup(ours, vanilla)


def test_bootstrap_agrees_with_a_slow_loop(simulate):
    turns = simulate(np.random.default_rng(3), [0.8, 0.4], questions=10, turns=2)
    chooser, taus = random.Random(0), []
    for _ in range(3000):
        drawn = [chooser.randrange(10) for _ in range(10)]
        lengths = [t.accept_lengths[1:] for q in drawn for t in turns if t.question_id == q]
        rounds = [emitted for turn in lengths for emitted in turn]
        taus.append(sum(rounds) / len(rounds))
    expected = np.quantile(taus, [0.025, 0.975])
    assert statistics.tau_interval(turns, resamples=3000) == pytest.approx(expected, abs=0.02)


def test_intervals_cover_the_truth(simulate):
    """Nominal coverage is 95%; percentile bootstraps of 30 prompts fall a little short of it."""
    generator = np.random.default_rng(1)
    shares = [0.7, 0.5, 0.6]
    # E[emitted] = 1 + the chance to reach each depth; seconds are proportional to rounds and one.
    truth = 1 + sum(np.cumprod(shares))
    taus, ratios, runs = 0, 0, 200
    for _ in range(runs):
        settings = {"questions": 30, "prompt_noise": 0.5}
        ours = simulate(generator, shares, limit=400, **settings)
        base = simulate(generator, [], limit=40, **settings)
        low, high = statistics.tau_interval(ours, 300)
        taus += low <= truth <= high
        low, high = statistics.speedup_interval(ours, base, 300)
        ratios += low <= 400 / (1 + 399 / truth) <= high
    assert 0.88 * runs <= taus <= 0.995 * runs
    assert 0.88 * runs <= ratios <= 0.995 * runs


def test_intervals_repeat_with_their_seed(simulate):
    turns = simulate(np.random.default_rng(0), [0.7, 0.5])
    assert statistics.tau_interval(turns, seed=4) == statistics.tau_interval(turns, seed=4)
    assert statistics.tau_interval(turns, seed=4) != statistics.tau_interval(turns, seed=5)
    with pytest.raises(ValueError, match="at least 1"):
        statistics.tau_interval(turns, resamples=0)


def test_acceptance_by_hand(make_turn):
    # Emitted 3 (accepted 2, rejected at 3), 1 (rejected at 1), 4 (all three accepted), then a last
    # round of 2 that may have been cut: it proves depth 1 and says nothing of depth 2.
    turns = [make_turn("a", (1, 3, 1, 4, 2))]
    assert statistics.acceptance_by_depth(turns, 3) == pytest.approx([3 / 4, 2 / 2, 1 / 2])


def test_acceptance_stops_before_a_depth_no_round_reached(make_turn):
    assert statistics.acceptance_by_depth([make_turn("a", (1, 2, 1, 1))], 4) == [1 / 2, 0.0]
    assert statistics.acceptance_by_depth([make_turn("a", (1, 1, 1))], 0) == []
    assert statistics.acceptance_by_depth([make_turn("a", (1, 1))], 3) == []


def test_acceptance_recovers_the_truth_through_truncation(simulate):
    """Short limits cut many rounds; dropping cut rounds would bias the estimate, this must not."""
    shares = [0.9, 0.8, 0.7, 0.6]
    turns = simulate(np.random.default_rng(2), shares, questions=3000, limit=41)
    assert statistics.acceptance_by_depth(turns, 4) == pytest.approx(shares, abs=0.03)


def test_records_refuse_what_does_not_fit(make_turn, make_run):
    with pytest.raises(ValueError, match="question q, turn 0: accept_lengths sums to 4"):
        make_turn("q", (1, 3), tokens=(1, 2))
    with pytest.raises(ValueError, match="prefill"):
        make_turn("q", (2, 3))
    with pytest.raises(ValueError, match="wall_times"):
        make_turn("q", seconds=(0.0,))
    with pytest.raises(ValueError, match="emitted nothing"):
        make_turn("q", (1, 0, 2))
    with pytest.raises(ValueError, match="no turns"):
        make_run([])
    with pytest.raises(ValueError, match="given twice"):
        make_run([make_turn("q"), make_turn("q")])
    with pytest.raises(ValueError, match="more than depth 1 allows"):
        make_run([make_turn("q", (1, 3))], depth=1)
