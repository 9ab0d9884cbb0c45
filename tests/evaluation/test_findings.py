"""What a report says in words: who is in the headline, what seeds make, what is to be doubted."""

import numpy as np
import pytest

from specjax.evaluation.findings import (
    curves_over_seeds,
    fastest_by_setting,
    notes_on,
    over_seeds,
)


@pytest.fixture
def seeded(make_rows):
    """Rows of two methods at three seeds, their numbers moved a little by each."""
    rows = []
    for seed in range(3):
        for row in make_rows(methods=("a", "b")):
            if row["method"] != "vanilla":
                row = row | {key: row[key] + 0.1 * seed for key in ("tau", "speedup")}
            rows.append(row | {"seed": seed})
    return rows


def test_one_seed_stays_what_it_is(make_rows):
    rows = make_rows(("t", "u"), (0.0, 1.0))
    assert over_seeds(rows) == [row | {"seeds": 1} for row in rows]


def test_seeds_are_averaged_in_any_order(seeded):
    merged = over_seeds(seeded)
    assert [row["method"] for row in merged] == ["vanilla", "a", "b"]
    for row in merged:
        own = [r for r in seeded if r["method"] == row["method"]]
        assert row["tau"] == pytest.approx(np.mean([r["tau"] for r in own]))
        assert row["tau_ci95"] == [min(r["tau"] for r in own), max(r["tau"] for r in own)]
        assert row["rounds"] == sum(r["rounds"] for r in own) and row["seeds"] == 3
    turned = {row["method"]: row for row in over_seeds(seeded[::-1])}
    for row in merged:
        other = turned[row["method"]]
        assert row["speedup"] == pytest.approx(other["speedup"])
        assert row["acceptance_by_depth"] == pytest.approx(other["acceptance_by_depth"])


def test_a_lucky_seed_makes_no_headline(seeded):
    lucky = next(row for row in seeded if row["method"] == "a" and row["seed"] == 0)
    steady = [row for row in seeded if row["method"] == "b"]
    lucky["speedup"] = 1 + max(row["speedup"] for row in steady)
    for row in steady:
        row["speedup"] += 0.9
    (best,) = fastest_by_setting(seeded)
    assert best["method"] == "b" and best["seeds"] == 3


def test_a_lossy_rule_makes_no_headline(make_rows):
    rows = make_rows()
    rows[1] |= {"speedup": 9.0, "exact": False, "rule": "typical"}
    (best,) = fastest_by_setting(rows)
    assert best["method"] == "fasteagle"
    assert "Lossy rules: eagle3 (typical)." in notes_on(rows)[0]
    assert "exact" in notes_on(rows[:1] + rows[2:])[0]


def test_small_p_values_are_counted(make_rows):
    rows = make_rows(temperatures=(1.0,), methods=list("abcde"))
    for row, p in zip(rows[1:], (0.04, 0.5, 0.9, 0.002, 0.05), strict=True):
        row["lossless"] = {"kind": "distribution", "test": "t", "p_value": p}
    rows[0]["lossless"] = {"kind": "distribution", "test": "t", "p_value": 1e-9}  # the reference
    (text,) = [note for note in notes_on(rows) if "p < 0.05" in note]
    assert "Of 5 tests" in text and "2 gave p < 0.05" in text and "makes 0.25" in text
    assert "smallest p is 0.002, 0.01 after" in text


def test_equal_answers_are_added_up(make_rows):
    rows = make_rows()
    rows[1]["lossless"] = {"kind": "identical", "checked": 8, "identical": 5, "ties": 2}
    (text,) = [note for note in notes_on(rows) if "token for token" in note]
    assert "13 of 16" in text and "2 more part at a tie" in text


def test_the_clock_is_doubted_by_its_own_measure(make_rows):
    rows = make_rows(("t", "u"))
    for row, ms in zip((r for r in rows if r["method"] == "vanilla"), (4.0, 5.0), strict=True):
        row["round_ms"] = ms
    assert any("4.00 to 5.00 ms in the 2 runs" in note for note in notes_on(rows))


def test_one_training_is_said_to_be_one(make_rows, seeded):
    once = "Each drafter was trained once"
    assert any(once in note for note in notes_on(make_rows()))
    assert not any(once in note for note in notes_on(seeded))
    assert notes_on([]) == []


def test_curves_of_seeds_become_one():
    curves = {
        "train/f/a/seed0": ((0, 10, 20), (1.0, 2.0, 3.0)),
        "train/f/a/seed12": ((0, 20, 30), (3.0, 5.0, 9.0)),
        "train/f/a/seed0-reference": ((0,), (7.0,)),
        "train/g": ((5,), (6.0,)),
    }
    assert curves_over_seeds(curves) == {
        "train/f/a": ([0, 20], [2.0, 4.0]),
        "train/f/a-reference": ([0], [7.0]),
        "train/g": ([5], [6.0]),
    }
