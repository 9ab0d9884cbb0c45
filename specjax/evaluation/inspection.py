"""A run folder as it is found: what it holds, and in words what it lacks."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from specjax.evaluation.figures import Curve
from specjax.evaluation.records import VANILLA
from specjax.evaluation.results import read_results
from specjax.evaluation.run_folder import read_curves
from specjax.evaluation.spec_bench import answers_name


@dataclass(frozen=True)
class RunFolder:
    """What a run has left behind.

    config:    the resolved config, {} where it cannot be read
    overrides: the fields that the command line changed
    results:   as `read_results` returns them, None where they cannot be read
    curves:    as `read_curves` returns them
    drafters:  name -> folder of every drafter that was saved whole
    missing:   what is not there or not whole, a sentence each; () = complete
    """

    folder: Path
    config: dict
    overrides: dict
    results: dict | None
    curves: dict[str, dict[str, Curve]]
    drafters: dict[str, Path]
    missing: tuple[str, ...]

    @property
    def rows(self) -> list[dict]:
        """The result rows, none where there are no results."""
        return self.results["rows"] if self.results else []

    @property
    def status(self) -> str:
        """Whether it is complete, in words; what is missing, a line each."""
        if not self.missing:
            return f"{self.folder}: complete, {len(self.rows)} rows"
        lines = [f"{self.folder}: INCOMPLETE", *self.missing]
        return "\n  - ".join(lines)


def inspect_run(folder: str | os.PathLike) -> RunFolder:
    """Reads what there is of a run, finished or not.

    Raises:
      FileNotFoundError: no such folder, or one that holds no file of a run.
    """
    folder = Path(folder)
    names = ("config.json", "metrics.jsonl", "results.json")
    if not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(f"{folder}: not a run folder; one of {', '.join(names)} expected")
    missing: list[str] = []
    record, results = {}, None
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, overrides = dict(record["config"]), dict(record.get("overrides") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        missing.append(f"config.json: {_reason(error)}; what was planned is not known")
        config, overrides = {}, {}
    metrics = folder / "metrics.jsonl"
    curves = read_curves(metrics) if metrics.is_file() else {"loss": {}, "tau": {}}
    if not metrics.is_file():
        missing.append("metrics.jsonl: missing; no training was logged")
    missing += _untrained(config, curves)
    saved = {
        path.parent.relative_to(folder / "drafters").as_posix(): path.parent
        for path in sorted((folder / "drafters").rglob("config.json"))
        if (path.parent / "model.safetensors").is_file()
    }
    if (folder / "results.json").is_file():
        try:
            results = read_results(folder / "results.json")
            missing += _unmeasured(folder, config, results["rows"])
        except (OSError, ValueError) as error:
            missing.append(f"results.json: {_reason(error)}")
    else:
        missing.append(
            "results.json: missing; the run has not finished. The same command with the same "
            "--workdir resumes it"
        )
    if _compares(config):
        absent = [name for name in config["drafters"] if name not in saved]
        missing += [f"drafters/{name}: missing or not whole" for name in absent]
    if results and not (folder / "report.html").is_file():
        missing.append("report.html: missing")
    return RunFolder(folder, config, overrides, results, curves, saved, tuple(missing))


def _reason(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"


def _compares(config: dict) -> bool:
    """Whether it is a run of `experiments.compare`, whose folder follows from its config."""
    return config.get("experiment") == "compare" and isinstance(config.get("drafters"), dict)


def _untrained(config: dict, curves) -> Iterator[str]:
    """Stages that stopped before their last step."""
    for stage, (steps, _) in curves["loss"].items():
        name = stage.removeprefix("train/")
        own = config.get("drafters", {}).get(name, {}) if _compares(config) else None
        if own is None:
            continue
        planned = own.get("train", {}).get("steps", config["train"]["steps"])
        log_every = config["train"]["log_every"]
        # The last steps are logged only where they end an interval.
        if steps[-1] + log_every <= planned:
            yield f"{stage}: trained for {steps[-1]} of {planned} steps"


def _unmeasured(folder: Path, config: dict, rows: list[dict]) -> Iterator[str]:
    """Rows that the config asks for, and answers that the rows were counted from."""
    found = {(row["method"], row["task"], row["temperature"]) for row in rows}
    if _compares(config):
        drafters, cfg = config["drafters"], config["eval"]
        best = [f"{name}/best" for name in drafters] if config["calibrate"]["prompts"] else []
        for task in cfg["tasks"]:
            for temperature in cfg["temperatures"]:
                for method in (VANILLA, *drafters, *best):
                    if (method, task, temperature) not in found:
                        yield f"results.json: no row of {method}, {task}, T={temperature:g}"
    written = {path.name for path in (folder / "answers").rglob("*.jsonl")}
    for name in dict.fromkeys(answers_name(method, T) for method, _, T in found):
        if name not in written:
            yield f"answers/{name}: missing"
