"""One drafter under many training objectives: seeds, paired differences, a winner met again."""

import json
import time

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from experiments.compare import Bench, decode_all, prepare, train_all, write_up
from specjax.console import make_console, print_rows
from specjax.evaluation.figures import draw_differences
from specjax.files import write_text
from specjax.training.progress import say

PLAIN = "fasteagle/plain"


def distill(config: ConfigDict, folder) -> dict:
    """The whole experiment; distillation.json and distillation.svg join the run folder."""
    started = time.perf_counter()
    bench = prepare(config, folder)
    rows, samples, flops = run_seeds(bench, config.seeds)
    summary = summarise(rows, flops, step_seconds(bench))
    others = [s for s in summary if s["method"] != PLAIN]
    best = max(others, key=lambda s: s["difference"])["method"]
    again, _, _ = run_seeds(bench, config.confirm_seeds, (PLAIN, best))
    confirmed = difference(again, best)
    verdict = (
        f"{best} less plain on fresh seeds {tuple(config.confirm_seeds)}: tau "
        "{:+.3f} [{:+.3f}, {:+.3f}], p = {:.3g} (one test)".format(
            confirmed["difference"], *confirmed["ci95"], confirmed["p_value"]
        )
    )
    record = {"summary": summary, "confirmed": {"method": best} | confirmed}
    write_text(folder / "distillation.json", json.dumps(record, indent=2) + "\n")
    write_text(folder / "distillation.svg", draw_differences(summary) + "\n")
    report = write_up(bench, [*rows, *again], samples, [verdict], started)
    print_summary(summary)
    say(verdict)
    return report


def run_seeds(bench: Bench, seeds, names=None) -> tuple[list[dict], list[dict], dict]:
    """(rows, samples of the first seed, flops of a training step by method) of every seed."""
    rows, samples, flops = [], [], {}
    for seed in seeds:
        methods = train_all(bench, seed, names, f"seed{seed}")
        flops |= {m.name: m.cost.step_flops for m in methods}
        some, answers = decode_all(bench, methods, seed, f"seed{seed}")
        rows += some
        samples = samples or answers
    return rows, samples, flops


# ---- statistics ----------------------------------------------------------------------------------


def taus_by_seed(rows, method: str) -> dict[int, float]:
    """Seed -> tau, the mean over tasks and temperatures."""
    seeds = dict.fromkeys(r["seed"] for r in rows)
    of = lambda seed: [r["tau"] for r in rows if (r["method"], r["seed"]) == (method, seed)]  # noqa: E731
    return {seed: float(np.mean(of(seed))) for seed in seeds if of(seed)}


def difference(rows, method: str) -> dict:
    """tau less plain's, paired by seed: mean, its t interval over seeds, and a paired t-test.

    Differences that are the same for all seeds test nothing (p = 1): no spread was seen.
    """
    ours, plain = taus_by_seed(rows, method), taus_by_seed(rows, PLAIN)
    gaps = np.array([ours[seed] - plain[seed] for seed in ours])
    if len(gaps) < 2:
        raise ValueError("seeds: a difference needs at least two")
    spread = float(gaps.std(ddof=1) / np.sqrt(len(gaps)))
    reach = spread * float(stats.t.ppf(0.975, len(gaps) - 1))
    mean = float(gaps.mean())
    p_value = 2 * float(stats.t.sf(abs(mean) / spread, len(gaps) - 1)) if spread > 0 else 1.0
    return {"difference": mean, "ci95": [mean - reach, mean + reach], "p_value": p_value}


def holm(p_values) -> list[float]:
    """Holm's correction: p-values that may be compared with the level as they stand."""
    order, adjusted, worst = np.argsort(p_values), np.zeros(len(p_values)), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, worst)
    return adjusted.tolist()


def summarise(rows, step_flops: dict, step_seconds: dict) -> list[dict]:
    """One entry a method, plain first: tau over seeds, acceptance, cost, difference from plain."""
    names = [PLAIN, *sorted({r["method"] for r in rows} - {PLAIN, "vanilla"})]
    entries = []
    for name in names:
        own, taus = [r for r in rows if r["method"] == name], taus_by_seed(rows, name)
        depths = min(len(r["acceptance_by_depth"]) for r in own)
        shares = np.mean([r["acceptance_by_depth"][:depths] for r in own], axis=0)
        entries.append(
            {
                "method": name,
                "tau": float(np.mean(list(taus.values()))),
                "tau_by_seed": {str(seed): value for seed, value in taus.items()},
                "acceptance_by_depth": shares.tolist(),
                "train_seconds": float(np.mean([r["train_seconds"] for r in own])),
                "step_ratio": step_seconds[name] / step_seconds[PLAIN],
                "flops_ratio": step_flops[name] / step_flops[PLAIN] if step_flops[PLAIN] else None,
            }
            | difference(rows, name)
        )
    corrected = holm([e["p_value"] for e in entries[1:]])
    for entry, p_value in zip(entries, [1.0, *corrected], strict=True):
        entry["p_holm"] = p_value
    return entries


def step_seconds(bench: Bench) -> dict[str, float]:
    """Method -> median seconds of a training step, from the logged throughput of all seeds."""
    rates: dict[str, list[float]] = {}
    for line in bench.metrics.path.read_text().splitlines():
        entry = json.loads(line)
        method = entry["stage"].removeprefix("train/").rsplit("/", 1)[0]
        if "tokens_per_s" in entry and not entry["stage"].endswith("-reference"):
            rates.setdefault(method, []).append(entry["tokens_per_s"])
    tokens = bench.config.train.batch_size * bench.config.data.length
    return {method: tokens / float(np.median(values)) for method, values in rates.items()}


def print_summary(summary) -> None:
    """The summary as a Markdown table."""
    cells = [
        (
            s["method"],
            f"{s['tau']:.3f}",
            " ".join(f"{value:.2f}" for value in s["tau_by_seed"].values()),
            " ".join(f"{100 * share:.0f}" for share in s["acceptance_by_depth"]),
            "" if s["method"] == PLAIN else f"{s['difference']:+.3f}",
            "" if s["method"] == PLAIN else "[{:+.3f}, {:+.3f}]".format(*s["ci95"]),
            "" if s["method"] == PLAIN else f"{s['p_holm']:.2g}",
            f"{s['step_ratio']:.2f}x",
            "" if s["flops_ratio"] is None else f"{s['flops_ratio']:.2f}x",
        )
        for s in summary
    ]
    headings = "objective|tau|by seed|accepted %|less plain|95% over seeds|Holm p|step time|flops"
    print_rows(make_console(), headings, cells)
