"""results.json: its contract, and that a bad number or a failed write spoils nothing."""

import json
import os

import numpy as np
import pytest

from specjax import files
from specjax.evaluation.results import read_results, result_row, write_results

# Written out once more on purpose: readers outside the project rely on exactly these.
CONTRACT = """method task temperature seed batch rule exact nodes depth prompts new_tokens rounds
tau tau_ci95 break_even_tau acceptance_by_depth tokens_per_s speedup speedup_ci95 draft_ms verify_ms
round_ms round_overhead drafter_parameters train_tokens train_seconds lossless""".split()
FURTHER = ["draft_flops", "verify_flops"]


@pytest.fixture
def runs(make_turn, make_run):
    ours = make_run([make_turn("a", (1, 3, 2), (2.0,)), make_turn("b", (1, 4, 1), (2.0,))])
    vanilla = [make_turn("a", (1,) * 6, (6.0,)), make_turn("b", (1,) * 6, (6.0,))]
    return ours, make_run(vanilla, "vanilla")


def test_row_keys_are_the_contract_in_order(runs):
    ours, vanilla = runs
    for run in runs:
        assert list(result_row(run, vanilla, 4.0)) == CONTRACT + FURTHER


def test_row_by_hand(runs):
    row = result_row(*runs, vanilla_ms_per_token=4.0)
    assert (row["prompts"], row["new_tokens"], row["rounds"]) == (2, 12, 4)
    assert row["tau"] == pytest.approx(10 / 4)
    assert row["tokens_per_s"] == pytest.approx(12 / 4)
    assert row["speedup"] == pytest.approx(3.0)
    assert row["speedup_ci95"] == pytest.approx([3.0, 3.0])
    assert row["break_even_tau"] == pytest.approx(5 / 4)
    assert row["round_overhead"] == pytest.approx(1 / 4)
    # Rounds of 3 and 4 come before the end of their turns; the last ones, of 2 and 1, count for
    # what they accepted: depth 1.
    assert row["acceptance_by_depth"] == pytest.approx([1.0, 1.0, 1 / 2, 0.0])


def test_vanilla_row_is_the_unit(runs):
    row = result_row(runs[1], runs[1], vanilla_ms_per_token=4.5)
    expected = {
        "tau": 1.0,
        "tau_ci95": [1.0, 1.0],
        "speedup": 1.0,
        "speedup_ci95": [1.0, 1.0],
        "break_even_tau": 1.0,
        "round_overhead": 0.0,
        "round_ms": 4.5,
        "draft_ms": 0.0,
        "acceptance_by_depth": [],
        "drafter_parameters": 0,
        "train_tokens": 0,
        "train_seconds": 0.0,
    }
    assert {key: row[key] for key in expected} == expected


def test_row_wants_the_same_setting(runs, make_run):
    ours, vanilla = runs
    hot = make_run(vanilla.turns, "vanilla", temperature=1.0)
    with pytest.raises(ValueError, match="temperature is 0.0, but the vanilla run's is 1.0"):
        result_row(ours, hot, 4.0)
    with pytest.raises(ValueError, match="vanilla_ms_per_token"):
        result_row(ours, vanilla, 0.0)
    with pytest.raises(ValueError, match="fasteagle, builtin, T=0: not paired"):
        result_row(make_run(ours.turns[:1]), vanilla, 4.0)


def test_written_results_are_read_back(tmp_path, header, make_rows):
    rows = make_rows(temperatures=(0.0, 1.0))
    rows[-1]["lossless"] = {"kind": "distribution", "test": "G", "p_value": np.float32(0.5)}
    rows[-1]["tau_ci95"] = (np.float64(1.0), 2.0)
    path = tmp_path / "new" / "results.json"
    write_results(path, header, rows)
    document = read_results(path)
    assert {key: document[key] for key in header} == header
    assert document["rows"][:-1] == rows[:-1]
    assert document["rows"][-1]["lossless"]["p_value"] == 0.5
    assert [list(row) for row in document["rows"]] == [CONTRACT + FURTHER] * len(rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan")])
def test_refuses_numbers_that_are_none(tmp_path, header, make_rows, bad):
    path = tmp_path / "results.json"
    rows = make_rows()
    rows[1]["tau_ci95"] = [1.0, bad]
    with pytest.raises(ValueError, match=r"row 1 \(eagle3, builtin\): tau_ci95\[1\] is (nan|inf)"):
        write_results(path, header, rows)
    with pytest.raises(ValueError, match=r"header: target\.parameters is"):
        write_results(path, header | {"target": {"parameters": bad}}, make_rows())
    assert not path.exists()


@pytest.mark.parametrize("key", CONTRACT)
def test_refuses_a_row_that_lacks_a_key(tmp_path, header, make_rows, key):
    rows = make_rows(methods=("eagle3",))
    del rows[1][key]
    with pytest.raises(ValueError, match=rf"row 1 .*: lacks {key}$"):
        write_results(tmp_path / "results.json", header, rows)
    assert not any(tmp_path.iterdir())


def test_refuses_an_unknown_or_partial_verdict(tmp_path, header, make_rows):
    rows = make_rows()
    for verdict, message in (
        ({"kind": "probably"}, "lossless kind is 'probably'"),
        ({"kind": "identical", "checked": 3}, "lossless: lacks identical, ties"),
        (None, "lossless kind is None"),
    ):
        rows[2]["lossless"] = verdict
        with pytest.raises(ValueError, match=message):
            write_results(tmp_path / "results.json", header, rows)


def test_a_failed_write_keeps_the_old_file(tmp_path, header, make_rows, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, header, make_rows())
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device.*results.json"):
        write_results(path, header, make_rows(methods=("eagle3",)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "page.html", "text")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="page.html"):
        files.write_text(tmp_path / "file" / "page.html", "text")


def test_reading_names_the_file_and_what_is_wrong(tmp_path, header, make_rows):
    path = tmp_path / "results.json"
    with pytest.raises(FileNotFoundError, match="results.json"):
        read_results(path)
    lacking = header | {"rows": [{"method": "x"}]}
    for text, message in (
        ('{"target":\n oops', "line 2 column 2"),
        ("[]", 'no list "rows"'),
        ('{"rows": []}', "header: lacks target"),
        (json.dumps(lacking), r"row 0 \(x, None\): lacks task"),
        (json.dumps(header | {"seed": float("nan"), "rows": []}), "header: seed is nan"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read_results(path)
        assert str(path) in str(error.value)
