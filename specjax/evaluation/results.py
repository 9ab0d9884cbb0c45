"""results.json: one row per method and setting, for machines. Its keys are a contract."""

import json
import math
import os
from pathlib import Path

import numpy as np

from specjax.evaluation import statistics
from specjax.evaluation.records import MethodRun
from specjax.files import write_text

HEADER_KEYS = ("target", "device", "dtype", "versions", "seed", "preset")
"""What a results file says beside its rows."""

ROW_KEYS = (
    "method", "task", "temperature", "seed", "batch", "rule", "exact", "nodes", "depth",
    "prompts", "new_tokens", "rounds", "tau", "tau_ci95", "break_even_tau", "acceptance_by_depth",
    "tokens_per_s", "speedup", "speedup_ci95", "draft_ms", "verify_ms", "round_ms",
    "round_overhead", "drafter_parameters", "train_tokens", "train_seconds", "lossless",
)  # fmt: skip
"""What every row says, in this order."""

FURTHER_KEYS = ("draft_flops", "verify_flops")
"""What our own rows say besides; files without them are read all the same."""

LOSSLESS_KEYS = {
    "identical": ("checked", "identical", "ties"),
    "distribution": ("test", "p_value"),
    "lossy": ("divergence",),
}
"""What a losslessness verdict of each kind says: prompts equal to vanilla's at temperature 0, a
test of the output law above it ({"kind": "distribution", "test": "...", "p_value": 0.43}), or how
far a rule that is lossy by design strays."""


def result_row(
    run: MethodRun,
    vanilla_run: MethodRun,
    vanilla_ms_per_token: float,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """One row of results.json.

    `vanilla_ms_per_token` is the fused vanilla step, the unit of break_even_tau and round_overhead;
    in the vanilla row it stands as round_ms too, whatever `run.round_ms` says. `bootstrap` is the
    number of resamples, `seed` theirs. Raises ValueError when the two runs are of different
    settings or prompts, or the vanilla step takes no time.
    """
    for field in ("task", "temperature", "batch"):
        ours, theirs = getattr(run, field), getattr(vanilla_run, field)
        if ours != theirs:
            raise ValueError(f"{run.name}: {field} is {ours}, but the vanilla run's is {theirs}")
    if not vanilla_ms_per_token > 0:
        raise ValueError(f"{run.name}: vanilla_ms_per_token is {vanilla_ms_per_token}")
    totals = statistics.question_totals(run.turns)
    row = {
        "method": run.method,
        "task": run.task,
        "temperature": float(run.temperature),
        "seed": run.seed,
        "batch": run.batch,
        "rule": run.rule,
        "exact": run.exact,
        "nodes": run.nodes,
        "depth": run.depth,
        "prompts": len(totals.question_ids),
        "new_tokens": int(totals.tokens_Q.sum()),
        "rounds": int(totals.rounds_Q.sum()),
        "tokens_per_s": statistics.tokens_per_second(run.turns),
        "verify_ms": float(run.verify_ms),
        "draft_flops": 0.0 if run.is_vanilla else float(run.draft_flops),
        "verify_flops": float(run.verify_flops),
        "lossless": dict(run.lossless),
    }
    if run.is_vanilla:
        row |= _vanilla_part(vanilla_ms_per_token)
    else:
        row |= _drafter_part(run, vanilla_run, vanilla_ms_per_token, bootstrap, seed)
    return {key: row[key] for key in (*ROW_KEYS, *FURTHER_KEYS)}


def write_results(path: str | os.PathLike, header: dict, rows: list[dict]) -> None:
    """Write header and rows as JSON, atomically.

    Raises ValueError, naming row and key, for a missing key, a losslessness verdict of an unknown
    kind, or a number that is NaN or infinite; OSError, naming the file, when it cannot be written.
    Nothing is written then. Further keys are kept.
    """
    document = plain({**header, "rows": rows})
    _check(document)
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_results(path: str | os.PathLike) -> dict:
    """The header with its "rows".

    Raises OSError when the file cannot be read and ValueError, naming the file, when it is not
    JSON (line and column) or lacks what `write_results` promises.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        document = json.loads(text)
        _check(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return document


def _vanilla_part(vanilla_ms_per_token: float) -> dict:
    """What is true of the baseline by definition, so no measuring noise gets into it."""
    return {
        "tau": 1.0,
        "tau_ci95": [1.0, 1.0],
        "break_even_tau": 1.0,
        "acceptance_by_depth": [],
        "speedup": 1.0,
        "speedup_ci95": [1.0, 1.0],
        "draft_ms": 0.0,
        "round_ms": float(vanilla_ms_per_token),
        "round_overhead": 0.0,
        "drafter_parameters": 0,
        "train_tokens": 0,
        "train_seconds": 0.0,
    }


def _drafter_part(
    run: MethodRun, vanilla_run: MethodRun, vanilla_ms_per_token: float, bootstrap: int, seed: int
) -> dict:
    turns, vanilla = run.turns, vanilla_run.turns
    break_even_tau = float(run.round_ms) / vanilla_ms_per_token
    try:
        return {
            "tau": statistics.tau(turns),
            "tau_ci95": list(statistics.tau_interval(turns, bootstrap, seed)),
            "break_even_tau": break_even_tau,
            "acceptance_by_depth": statistics.acceptance_by_depth(turns, run.depth),
            "speedup": statistics.speedup(turns, vanilla),
            "speedup_ci95": list(statistics.speedup_interval(turns, vanilla, bootstrap, seed)),
            "draft_ms": float(run.draft_ms),
            "round_ms": float(run.round_ms),
            "round_overhead": break_even_tau - 1,
            "drafter_parameters": run.drafter_parameters,
            "train_tokens": run.train_tokens,
            "train_seconds": float(run.train_seconds),
        }
    except ValueError as error:
        raise ValueError(f"{run.name}: {error}") from error


def _check(document) -> None:
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise ValueError('not a results file: no list "rows"')
    _require(document, HEADER_KEYS, "header")
    header = {key: value for key, value in document.items() if key != "rows"}
    for key, value in header.items():
        _refuse_non_finite(value, f"header: {key}")
    for index, row in enumerate(document["rows"]):
        if not isinstance(row, dict):
            raise ValueError(f"row {index}: not an object")
        _check_row(row, f"row {index} ({row.get('method')}, {row.get('task')})")


def _check_row(row: dict, where: str) -> None:
    _require(row, ROW_KEYS, where)
    for key, value in row.items():
        _refuse_non_finite(value, f"{where}: {key}")
    verdict = row["lossless"]
    kind = verdict.get("kind") if isinstance(verdict, dict) else verdict
    if kind not in LOSSLESS_KEYS:
        raise ValueError(f"{where}: lossless kind is {kind!r}, not one of {list(LOSSLESS_KEYS)}")
    _require(verdict, LOSSLESS_KEYS[kind], f"{where}: lossless")


def _require(mapping: dict, keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")


def _refuse_non_finite(value, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_non_finite(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_non_finite(inner, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}")


def plain(value):
    """NumPy scalars and arrays, and tuples, as what JSON knows."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value
