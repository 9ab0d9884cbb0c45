"""Variants of a drafter, its objectives above all: seeds, paired differences, a second meeting."""

import json
import time

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from experiments.compare import (
    Bench,
    decode_all,
    init_all,
    prepare,
    train_all,
    write_up,
)
from experiments.training_data import train_config
from specjax.console import make_console, print_rows
from specjax.evaluation.figures import draw_differences
from specjax.evaluation.inline_svg import standalone
from specjax.evaluation.timing import calls_in_turns
from specjax.files import write_text
from specjax.progress import say
from specjax.training.drafter import needs_reference, set_up


def plain_of(method: str) -> str:
    """The row that a row is compared with: its drafter under the plain objective."""
    return method.rsplit("/", 1)[0] + "/plain"


def is_plain(method: str) -> bool:
    """Whether a row is one that others are compared with."""
    return method == plain_of(method)


def distill(config: ConfigDict, folder) -> dict:
    """The whole experiment; distillation.json and distillation.svg join the run folder."""
    started = time.perf_counter()
    bench = prepare(config, folder)
    rows, samples, flops = run_seeds(bench, config.seeds)
    summary = summarise(rows, flops, step_seconds(bench))
    others = [s for s in summary if not is_plain(s["method"])]
    best = max(others, key=lambda s: s["difference"])["method"]
    again, _, _ = run_seeds(bench, config.confirm_seeds, (plain_of(best), best))
    confirmed = difference(again, best)
    verdict = (
        f"{best} less plain on fresh seeds {tuple(config.confirm_seeds)}: tau "
        "{:+.3f} [{:+.3f}, {:+.3f}], p = {:.3g} (one test)".format(
            confirmed["difference"], *confirmed["ci95"], confirmed["p_value"]
        )
    )
    record = {"summary": summary, "confirmed": {"method": best} | confirmed}
    write_text(folder / "distillation.json", json.dumps(record, indent=2) + "\n")
    write_text(folder / "distillation.svg", standalone(draw_differences(summary)) + "\n")
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
    """tau less its plain row's, paired by seed: mean, t interval over seeds, paired t-test.

    Differences that are the same for all seeds test nothing (p = 1): no spread was seen.
    """
    ours, plain = taus_by_seed(rows, method), taus_by_seed(rows, plain_of(method))
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
    names = {r["method"] for r in rows} - {"vanilla"}
    names = sorted(names, key=lambda name: (plain_of(name), not is_plain(name), name))
    entries = []
    for name in names:
        own, taus = [r for r in rows if r["method"] == name], taus_by_seed(rows, name)
        plain, depths = plain_of(name), min(len(r["acceptance_by_depth"]) for r in own)
        shares = np.mean([r["acceptance_by_depth"][:depths] for r in own], axis=0)
        entries.append(
            {
                "method": name,
                "tau": float(np.mean(list(taus.values()))),
                "tau_by_seed": {str(seed): value for seed, value in taus.items()},
                "acceptance_by_depth": shares.tolist(),
                "draft_ms": float(np.mean([r["draft_ms"] for r in own])),
                "verify_ms": float(np.mean([r["verify_ms"] for r in own])),
                "train_seconds": float(np.mean([r["train_seconds"] for r in own])),
                "step_ratio": step_seconds[name] / step_seconds[plain],
                "flops_ratio": step_flops[name] / step_flops[plain] if step_flops[plain] else None,
            }
            | difference(rows, name)
        )
    tested = [e for e in entries if not is_plain(e["method"])]
    for entry in entries:
        entry["p_holm"] = 1.0
    for entry, p_value in zip(tested, holm([e["p_value"] for e in tested]), strict=True):
        entry["p_holm"] = p_value
    return entries


def step_seconds(bench: Bench, repeats: int = 9) -> dict[str, float]:
    """Method -> median seconds of a training step; all methods take turns."""
    config, target, calls = bench.config, bench.target, {}
    for name, drafter in init_all(config, target, bench.train_rows, config.seed).items():
        cfg = train_config(config, name)
        reference = drafter if needs_reference(cfg) else None
        step, state, frozen = set_up(target, drafter, cfg, bench.mesh, reference=reference)
        rows = {k: v[: cfg.batch_size] for k, v in bench.train_rows.items()}
        calls[name] = (lambda s, step=step, f=frozen, rows=rows: step(s, f, rows)), state
    times_ms = calls_in_turns(list(calls.values()), repeats)
    return {name: ms / 1e3 for name, ms in zip(calls, times_ms, strict=True)}


def print_summary(summary) -> None:
    """The summary as a Markdown table."""
    cells = [
        (
            s["method"],
            f"{s['tau']:.3f}",
            " ".join(f"{value:.2f}" for value in s["tau_by_seed"].values()),
            " ".join(f"{100 * share:.0f}" for share in s["acceptance_by_depth"]),
            "" if is_plain(s["method"]) else f"{s['difference']:+.3f}",
            "" if is_plain(s["method"]) else "[{:+.3f}, {:+.3f}]".format(*s["ci95"]),
            "" if is_plain(s["method"]) else f"{s['p_holm']:.2g}",
            f"{s['draft_ms']:.2f}",
            f"{s['verify_ms']:.2f}",
            f"{s['step_ratio']:.2f}x",
            "" if s["flops_ratio"] is None else f"{s['flops_ratio']:.2f}x",
        )
        for s in summary
    ]
    headings = (
        "objective|tau|by seed|accepted %|less plain|95% over seeds|Holm p|draft ms|verify ms|"
        "training step|flops"
    )
    print_rows(make_console(), headings, cells)
