"""What a report says in words about its rows: who is fastest, and what to doubt."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from specjax.evaluation.figures import Curve
from specjax.evaluation.records import VANILLA
from specjax.evaluation.tables import count, setting


def over_seeds(rows: Sequence[dict]) -> list[dict]:
    """One row a method and setting: with several seeds their mean, and intervals from the lowest to
    the highest of them. "seeds" says how many there were."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], setting(row), row["exact"]), []).append(row)
    return [_mean(own) for own in groups.values()]


def _mean(rows: Sequence[dict]) -> dict:
    if len(rows) == 1:
        return rows[0] | {"seeds": 1}
    merged = rows[0] | {"seeds": len(rows), "rounds": sum(row["rounds"] for row in rows)}
    for key in ("tau", "speedup", "break_even_tau", "draft_ms", "verify_ms", "round_ms"):
        merged[key] = float(np.mean([row[key] for row in rows]))
    for key in ("tau", "speedup"):
        values = [row[key] for row in rows]
        merged[f"{key}_ci95"] = [min(values), max(values)]
    depths = min(len(row["acceptance_by_depth"]) for row in rows)
    shares = [row["acceptance_by_depth"][:depths] for row in rows]
    return merged | {"acceptance_by_depth": np.mean(shares, axis=0).tolist()}


def curves_over_seeds(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Stages that differ in the seed alone ("train/NAME/seed0") as one, the mean at the steps that
    all of them have."""
    groups: dict[str, list[dict]] = {}
    for stage, (steps, values) in curves.items():
        name = re.sub(r"/seed\d+", "", stage)
        groups.setdefault(name, []).append(dict(zip(steps, values, strict=True)))
    merged = {}
    for name, lines in groups.items():
        steps = sorted(set.intersection(*map(set, lines)))
        if steps:
            merged[name] = steps, [float(np.mean([ln[step] for ln in lines])) for step in steps]
    return merged


def fastest_by_setting(rows: Sequence[dict]) -> list[dict]:
    """For each setting the row of the exact method with the highest speedup, seeds averaged."""
    best: dict[str, dict] = {}
    for row in over_seeds(rows):
        if row["method"] != VANILLA and row["exact"]:
            other = best.setdefault(setting(row), row)
            if row["speedup"] > other["speedup"]:
                best[setting(row)] = row
    return list(best.values())


def notes_on(rows: Sequence[dict]) -> list[str]:
    """What a reader should know before believing the numbers, from the numbers themselves."""
    drafted = [row for row in rows if row["method"] != VANILLA]
    parts = (_on_rules(drafted), _on_identity(drafted), _on_laws(drafted), _on_clocks(rows),
             _on_seeds(drafted))  # fmt: skip
    return [part for part in parts if part]


def _on_rules(rows: Sequence[dict]) -> str:
    lossy = dict.fromkeys(f"{r['method']} ({r['rule']})" for r in rows if not r["exact"])
    if lossy:
        return (
            f"Lossy rules: {', '.join(lossy)}. Their speed is bought with other output than the "
            "target's; they stand in no headline and are never the bold one of the table."
        )
    return (
        "Every rule used here is exact: it keeps the target's output, or its law." if rows else ""
    )


def _on_identity(rows: Sequence[dict]) -> str:
    verdicts = [row["lossless"] for row in rows if row["lossless"]["kind"] == "identical"]
    if not verdicts:
        return ""
    checked, same, ties = (
        sum(v[key] for v in verdicts) for key in ("checked", "identical", "ties")
    )
    text = f"At temperature 0, {same} of {checked} answers equal vanilla's token for token"
    return text + (f"; {ties} more part at a tie of the target's two best logits." if ties else ".")


def _on_laws(rows: Sequence[dict]) -> str:
    """How many small p-values there are and how many chance alone would make."""
    values = [r["lossless"]["p_value"] for r in rows if r["lossless"]["kind"] == "distribution"]
    if not values:
        return ""
    low = sum(value < 0.05 for value in values)
    lowest = min(1.0, len(values) * min(values))
    return (
        f"Of {len(values)} tests of the sampled output's law, {low} gave p < 0.05, "
        f"where chance alone makes {0.05 * len(values):.2g} on average; the smallest p "
        f"is {min(values):.2g}, {lowest:.2g} after Bonferroni's correction. A large p is no proof: "
        "a test sees departures as large as its sample allows."
    )


def _on_clocks(rows: Sequence[dict]) -> str:
    """How far the one number moves that is measured again and again: the plain step."""
    steps = [row["round_ms"] for row in rows if row["method"] == VANILLA]
    text = "Timings are noisy, those of a round's parts most of all; the paired speedups less so."
    if len(steps) > 1:
        low, high = min(steps), max(steps)
        text += (
            f" The plain step alone took {low:.2f} to {high:.2f} ms in the {len(steps)} runs that "
            "timed it (sampling included above temperature 0): differences of milliseconds within "
            "that spread say nothing."
        )
    return text if rows else ""


def _on_seeds(rows: Sequence[dict]) -> str:
    trained = [row for row in rows if row["train_tokens"]]
    if not trained or len({row["seed"] for row in trained}) > 1:
        return ""
    most = max(row["train_tokens"] for row in trained)
    return (
        f"Each drafter was trained once (one seed, {count(most)} tokens at most). Intervals cover "
        "the choice of prompts, not how a second training would have turned out."
    )
