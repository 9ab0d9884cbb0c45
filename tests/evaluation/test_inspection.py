"""A complete folder lacks nothing; take anything away and its absence is said, the rest is read."""

import importlib
import json
import shutil

import pytest

from specjax.evaluation.inspection import inspect_run
from specjax.evaluation.results import HEADER_KEYS, write_results
from specjax.evaluation.spec_bench import answers_name
from specjax.training.run import open_run


@pytest.fixture
def folder(tmp_path, make_rows):
    """What a finished run leaves behind, without having run."""
    config = importlib.import_module("configs.fasteagle").get_config("smoke")
    config.calibrate.prompts = 0
    run = open_run(str(tmp_path / "run"), config, {"seed": 0})
    rows = make_rows(config.eval.tasks, config.eval.temperatures, tuple(config.drafters))
    header = dict.fromkeys(HEADER_KEYS, "") | {"target": {}, "versions": {}, "seed": 0}
    write_results(run / "results.json", header, rows)
    (run / "report.html").write_text("page")
    (run / "answers").mkdir()
    for row in rows:
        (run / "answers" / answers_name(row["method"], row["temperature"])).write_text("{}\n")
    steps = config.train.steps
    lines = [
        {"step": step, "stage": f"train/{name}", "loss": 1.0}
        for name in config.drafters
        for step in (steps // 2, steps)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in config.drafters:
        for file in ("config.json", "model.safetensors"):
            (run / "drafters" / name).mkdir(parents=True, exist_ok=True)
            (run / "drafters" / name / file).write_text("{}")
    return run


def test_a_finished_run_lacks_nothing(folder):
    run = inspect_run(folder)
    assert run.missing == () and run.status == f"{folder}: complete, 6 rows"
    assert len(run.rows) == 6 and set(run.drafters) == {"fasteagle", "eagle3"}
    assert run.config["experiment"] == "compare" and run.overrides == {"seed": 0}
    assert set(run.curves["loss"]) == {"train/fasteagle", "train/eagle3"}


PARTS = {
    "config.json": "config.json: missing",
    "metrics.jsonl": "metrics.jsonl: missing",
    "results.json": "has not finished",
    "report.html": "report.html: missing",
    "drafters/eagle3/model.safetensors": "drafters/eagle3: missing or not whole",
    "drafters/fasteagle": "drafters/fasteagle: missing",
    "answers/eagle3-temp-1.0.jsonl": "answers/eagle3-temp-1.0.jsonl: missing",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_taken_away_is_named_and_the_rest_is_read(folder, part):
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = inspect_run(folder)
    (line,) = run.missing
    assert PARTS[part] in line and run.status == f"{folder}: INCOMPLETE\n  - {line}"
    assert bool(run.rows) == (part != "results.json")
    assert bool(run.curves["loss"]) == (part != "metrics.jsonl")


@pytest.mark.parametrize("part", ["config.json", "results.json"])
def test_a_damaged_file_is_named_and_the_rest_is_read(folder, part):
    path = folder / part
    path.write_text(path.read_text()[:-20])
    run = inspect_run(folder)
    (line,) = run.missing
    assert line.startswith(f"{part}: cannot be read")
    assert set(run.drafters) == {"fasteagle", "eagle3"}


def test_a_row_that_the_config_asks_for_is_missed(folder):
    results = json.loads((folder / "results.json").read_text())
    results["rows"] = [
        row for row in results["rows"] if (row["method"], row["temperature"]) != ("eagle3", 1.0)
    ]
    (folder / "results.json").write_text(json.dumps(results))
    (line,) = inspect_run(folder).missing
    assert line == "results.json: no row of eagle3, stdlib, T=1"


def test_training_cut_short_is_told_by_its_steps(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    (line,) = inspect_run(folder).missing
    stage = json.loads(lines[-1])["stage"]
    assert line == f"{stage}: trained for 5 of 10 steps"


def test_what_is_no_run_folder_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="not a run folder"):
            inspect_run(folder)
