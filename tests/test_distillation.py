"""The comparison of objectives: its statistics, its recipes, and one small run."""

import importlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import ttest_rel

from configs import distillation
from experiments.distillation import (
    difference,
    holm,
    plain_of,
    summarise,
    taus_by_seed,
)
from experiments.training_data import train_config
from specjax.training.objective import make_objective

PLAIN = "fasteagle/plain"
ROOT = pathlib.Path(__file__).resolve().parents[1]


def rows_of(taus, train_seconds=1.0):
    """Result rows, as far as the summary reads them: {method: tau by seed}."""
    return [
        {
            "method": method, "seed": seed, "tau": tau, "train_seconds": train_seconds,
            "acceptance_by_depth": [0.5, 0.25][: 1 + (tau > 1.5)], "draft_ms": seed, "verify_ms": 4,
        }
        for method, values in taus.items()
        for seed, tau in enumerate(values)
    ]  # fmt: skip


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])


def test_holm_never_undercuts_and_keeps_the_order():
    p = np.random.default_rng(0).random(9) ** 3
    adjusted = np.array(holm(list(p)))
    assert (adjusted >= p).all() and (adjusted <= np.minimum(1, 9 * p)).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_differences_are_a_paired_t_test():
    rng = np.random.default_rng(1)
    plain = 2 + 0.3 * rng.normal(size=4)
    other = plain + 0.1 + 0.05 * rng.normal(size=4)  # far less noise between than among seeds
    rows = rows_of({PLAIN: plain, "fasteagle/x": other})
    found, expected = difference(rows, "fasteagle/x"), ttest_rel(other, plain)
    assert found["p_value"] == pytest.approx(expected.pvalue)
    np.testing.assert_allclose(found["ci95"], expected.confidence_interval(0.95))
    assert taus_by_seed(rows, PLAIN) == dict(enumerate(plain))
    with pytest.raises(ValueError, match="seeds"):
        difference(rows_of({PLAIN: [2.0], "fasteagle/x": [2.1]}), "fasteagle/x")


def test_the_summary_starts_with_plain_and_says_costs_as_ratios():
    rows = rows_of({"fasteagle/b": [2.0, 2.3], PLAIN: [1.0, 1.2], "fasteagle/a": [1.0, 1.2]})
    names = (PLAIN, "fasteagle/a", "fasteagle/b")
    flops, seconds = dict(zip(names, (2.0, 2.0, 6.0))), dict(zip(names, (0.5, 0.5, 1.0)))  # noqa: B905
    summary = summarise(rows, flops, seconds)
    assert [s["method"] for s in summary] == list(names)
    assert summary[2]["flops_ratio"] == 3 and summary[2]["step_ratio"] == 2
    assert summary[2]["difference"] == pytest.approx(1.05) and summary[1]["p_holm"] == 1.0
    assert (summary[0]["draft_ms"], summary[0]["verify_ms"]) == (0.5, 4)  # means over seeds
    assert len(summary[0]["acceptance_by_depth"]) == 1  # as deep as every seed got


def test_each_drafter_is_compared_with_its_own_plain_row():
    rows = rows_of(
        {"b/x": [2.0, 2.3], "b/plain": [1.0, 1.2], PLAIN: [3.0, 3.1], "fasteagle/a": [3.0, 3.2]}
    )
    names = ("b/plain", "b/x", PLAIN, "fasteagle/a")
    ones = dict.fromkeys(names, 1.0)
    summary = summarise(rows, ones, ones)
    assert [s["method"] for s in summary] == list(names)
    assert [s["difference"] for s in summary] == pytest.approx([0, 1.05, 0, 0.05])


@pytest.mark.parametrize("preset", ["", "draft_model", "smoke"])
def test_every_recipe_builds_its_objective(preset):
    config = distillation.get_config(preset)
    config.lock()
    for name in config.drafters:
        cfg = train_config(config, name)
        make_objective(cfg.loss, cfg.steps)
    plain = plain_of(name)
    assert train_config(config, plain).to_dict() == config.train.to_dict()


@pytest.mark.parametrize("name", distillation.OBJECTIVES)
def test_every_objective_is_a_recipe_of_its_own(name):
    config = importlib.import_module(f"configs.distill.{name}").get_config()
    assert config.name == name and list(config.drafters) == ["fasteagle"]
    make_objective(train_config(config, "fasteagle").loss, 10)


@pytest.mark.slow
def test_the_smoke_run_compares_and_confirms(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.main", "--config=configs/distillation.py:smoke",
            f"--workdir={tmp_path}", "--config.eval.max_new_tokens=8",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "distillation.json").read_text())
    methods = [s["method"] for s in record["summary"]]
    assert methods[0] == PLAIN and set(methods) == {f"fasteagle/{r}" for r in distillation.SMOKE}
    assert record["confirmed"]["method"] in methods[1:]
    assert "<svg" in (tmp_path / "distillation.svg").read_text()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {r["seed"] for r in rows} == {0, 1, 10, 11}
    assert all(r["lossless"]["identical"] == r["lossless"]["checked"] for r in rows)
