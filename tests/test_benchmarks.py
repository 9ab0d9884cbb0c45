"""The benchmarks run and report what they promise; no time is asserted."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PARTS = (  # of a training step
    "target forward", "drafter forward and backward", "logits and loss, forward and backward",
    "optimiser",
)  # fmt: skip
TINY = "random:32x48x2x61:2:1:16"


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a benchmark as a user does."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_decode_reports_every_part_beside_its_floor(tmp_path):
    file = tmp_path / "decode.json"
    done = run(
        "decode", f"--target={TINY}", "--context=32", "--rows=1,4", "--depth=2",
        "--candidates=2", "--repeats=1", "--in_a_row=2", f"--json={file}",
        f"--profile={tmp_path / 'profile'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    names = [row["what"] for row in report["rows"]]
    for part in ("vanilla round", "verify 1 row", "verify 4 rows"):
        assert part in names
    for method in ("fasteagle chain", "fasteagle tree", "eagle3 chain", "eagle3 tree"):
        assert {f"{method}: draft", f"{method}: round"} < set(names)
        assert any(name.startswith(f"{method}: verify") for name in names)
    assert all(row["floor_ms"] > 0 and row["ms"] > 0 for row in report["rows"])
    assert all(limit["per_second"] > 0 for limit in report["machine"].values())
    assert [split["method"] for split in report["splits"]][0] == "vanilla"
    assert {row["shape"] for row in report["drafts"]} == {"chain", "tree"}
    assert all(name in done.stdout for name in names)
    assert any((tmp_path / "profile").rglob("*.xplane.pb"))


def test_decode_refuses_a_geometry_it_cannot_read():
    done = run("decode", "--target=random:32x48x2")
    assert done.returncode == 2
    assert "random:HIDDENxFFNxLAYERSxVOCAB" in done.stderr


def test_transformers_and_specjax_give_the_same_tokens(tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "versus.json"
    done = run(
        "vs_transformers", f"--target={TINY}", "--new_tokens=8", "--prompts=2",
        "--prompt_tokens=8", "--repeats=1", f"--json={file}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["transformers greedy", "transformers prompt lookup", "specjax vanilla"]
    assert all(row["identical"] + row["ties"] == row["prompts"] for row in rows.values())
    assert all(row["ms_per_token"] > 0 for row in rows.values())


def test_load_weighs_every_way_of_loading(tmp_path):
    file = tmp_path / "load.json"
    done = run("load", f"--target={TINY}", "--shards=2", "--repeats=1", f"--json={file}")
    assert done.returncode == 0, done.stderr
    rows = {row["form"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["specjax", "specjax, scan_layers", "naive"]
    assert len({row["held"] for row in rows.values()}) == 1
    assert all(row["seconds"] > 0 for row in rows.values())


def test_train_shows_where_a_step_goes(tmp_path):
    file = tmp_path / "train.json"
    done = run(
        "train", "--config=configs/fasteagle.py:smoke", f"--config.target.name={TINY}",
        "--config.drafters.eagle3.init.draft_vocab_size=32", "--batch=2", "--length=16",
        "--repeats=1", f"--json={file}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    rows = {row["what"]: row for row in report["rows"]}
    for method in ("eagle3", "fasteagle"):
        step, parts = rows[f"{method}: step"], [rows[f"{method}: {part}"] for part in PARTS]
        assert step["flops"] == sum(part["flops"] for part in parts)  # nothing left out or twice
        assert all(row["ms"] > 0 and row["share_of_dot"] > 0 for row in (step, *parts))
    assert {host["method"] for host in report["host"]} == {"eagle3", "fasteagle"}
    assert all(name in done.stdout for name in rows)
