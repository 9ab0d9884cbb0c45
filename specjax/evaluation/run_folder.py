"""What a report needs of a run folder, read back from its files."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from specjax.evaluation.figures import Curve
from specjax.evaluation.results import read_results
from specjax.files import write_text

CURVES = ("loss", "agree_1", "tau")
"""The keys of metrics.jsonl that a report draws."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    results:   what `read_results` returns
    curves:    what `read_curves` returns; {} where nothing was trained
    samples:   {"method", "prompt", "pieces": [(text, depth), ...]}; depth 0 is a token of the
               target's own, 1 and up an accepted draft token of that depth
    notes:     paragraphs of plain text about the run
    config:    the whole resolved config, {} = not known
    overrides: what the command line changed in it
    """

    results: dict
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    samples: Sequence[dict] = ()
    notes: Sequence[str] = ()
    config: dict = field(default_factory=dict)
    overrides: dict = field(default_factory=dict)


def read_run(folder: str | os.PathLike) -> Run:
    """A run from its folder. samples.json may be missing: older runs have none.

    Raises FileNotFoundError, naming the folder and every file it lacks, for a run that is not
    finished, and ValueError, naming the file, for one that does not hold what it should.
    """
    folder = Path(folder)
    needed = ["results.json", "config.json"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        what = "lacks " + " and ".join(missing) if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"{folder}: {what}; a finished run has both")
    results = read_results(folder / "results.json")
    metrics = folder / "metrics.jsonl"
    if any(row["train_seconds"] for row in results["rows"]) and not metrics.is_file():
        raise FileNotFoundError(
            f"{folder}: lacks metrics.jsonl, though results.json has trained rows"
        )
    record = _read_object(folder / "config.json", {"config": dict, "overrides": dict})
    texts = {"samples": [], "notes": []}
    if (folder / "samples.json").is_file():
        texts = _read_object(folder / "samples.json", {"samples": list, "notes": list})
        _check_samples(texts, folder / "samples.json")
    curves = read_curves(metrics) if metrics.is_file() else {}
    return Run(results, curves, texts["samples"], texts["notes"], **record)


def write_samples(path: str | os.PathLike, samples: Sequence[dict], notes: Sequence[str]) -> None:
    """Write samples.json, atomically: the part of a report that no other file of a run holds."""
    record = {"samples": list(samples), "notes": list(notes)}
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read_curves(path: str | os.PathLike) -> dict[str, dict[str, Curve]]:
    """metrics.jsonl as {key of `CURVES`: {stage: (steps, values)}}, steps ascending.

    Lines that are not whole JSON objects are skipped, for a run that was killed leaves one behind;
    a step logged again after resuming counts once, as logged last; values that are not finite are
    left out.
    """
    points: dict[str, dict[str, dict]] = {key: {} for key in CURVES}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or not _is_number(entry.get("step")):
            continue
        for key, stages in points.items():
            if _is_number(entry.get(key)):
                stage = stages.setdefault(str(entry.get("stage", "train")), {})
                stage[entry["step"]] = entry[key]
    return {
        key: {name: tuple(zip(*sorted(line.items()), strict=True)) for name, line in stages.items()}
        for key, stages in points.items()
    }


def _read_object(path: Path, fields: dict[str, type]) -> dict:
    """The named fields of a JSON object, each of the type given."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name, kind in fields.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise ValueError(f'{path}: no {kind.__name__} "{name}"')
    return {name: record[name] for name in fields}


def _check_samples(texts: dict, path: Path) -> None:
    for index, sample in enumerate(texts["samples"]):
        try:
            whole = all(isinstance(sample[key], str) for key in ("method", "prompt"))
            whole = whole and all(
                isinstance(text, str) and type(depth) is int for text, depth in sample["pieces"]
            )
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise ValueError(
                f"{path}: sample {index}: expected method, prompt and pieces of [text, depth]"
            )
    if not all(isinstance(note, str) for note in texts["notes"]):
        raise ValueError(f"{path}: notes: expected texts")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
