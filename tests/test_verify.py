"""experiments.verify: what it says of right, wrong and lossy rules, and how it ends."""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_target

import specjax
from experiments.checks import verify
from specjax.evaluation import exactness
from specjax.evaluation.exactness import Settings, check_pair, rounding_tie, row_noise
from specjax.evaluation.lossless import TIE
from specjax.sampling import Sampling
from specjax.verification.match import Match

ROOT = pathlib.Path(__file__).resolve().parents[1]
RAGGED = np.random.default_rng(0)
PROMPTS = [RAGGED.integers(0, 12, RAGGED.integers(1, 9)).tolist() for _ in range(16)]
SAMPLED = Settings(temperatures=(1.0,), max_new_tokens=32)


class AcceptFirst(Match):
    """Wrong on purpose: where no child has the target's token, the first child is accepted."""

    name: ClassVar[str] = "accept-first"

    def verify(self, noise, draft, rows, force_T=None):
        return super().verify(noise, draft, rows, draft.valid_T)


class SameNoise(Match):
    """Wrong on purpose: every round uses the same noise."""

    name: ClassVar[str] = "same-noise"

    def verify(self, noise, draft, rows, force_T=None):
        noise = jax.tree.map(lambda x: jnp.linspace(0.1, 0.9, x.size, dtype=x.dtype), noise)
        return super().verify(noise, draft, rows, force_T)


class Declared(AcceptFirst):
    """The first fault, owned up to."""

    name: ClassVar[str] = "declared"
    exact: ClassVar[bool] = False


@pytest.fixture(scope="module")
def target():
    return toy_target(seed=34, num_layers=2)


@pytest.fixture(scope="module")
def drafter(target):
    return specjax.init_drafter("fasteagle", target, num_layers=2, candidates=2)


def report(*args, **kwargs):
    """(status, JSON document, printed text)."""
    page = io.StringIO()
    status, document = verify(*args, **kwargs, file=page)
    json.dumps(document, allow_nan=False)
    return status, document, page.getvalue()


def test_an_exact_pair_passes_at_every_temperature(target, drafter, tmp_path):
    drafter.save(tmp_path)
    drafter = specjax.load_drafter(tmp_path, target)
    settings = Settings(temperatures=(0.0, 1.0), top_p=0.95, max_new_tokens=32)
    status, document, page = report(target, drafter, PROMPTS, None, settings)
    greedy, sampled = document["checks"]
    assert status == 0 and document["passed"] and "VERDICT: lossless" in page
    assert greedy["verdict"] == {"kind": "identical", "checked": 16, "identical": 16, "ties": 0}
    assert greedy["accepted"] > 0 and sampled["accepted"] > 0
    assert sampled["verdict"]["p_value"] >= settings.level == 0.01
    assert all(name in page for name in ("PIT by id", "PIT between answers", "T=1: holds"))
    assert len({len(line) for line in page.splitlines() if line.startswith("|")}) == 1


def test_plain_decoding_is_checked_against_recomputation(target):
    settings = Settings(temperatures=(0.0,), max_new_tokens=32)
    (check,) = check_pair(target, None, PROMPTS, settings=settings)
    assert check.passed and check.verdict["identical"] == 16 and check.accepted == 0


def test_batches_do_not_share_noise(target, monkeypatch):
    seeds = []

    def record(target, prompts, drafter, limit, temperature, top_k, top_p, seed, rule):
        seeds.append((len(prompts), seed))
        return specjax.generation.Generation([[1]] * len(prompts), [""], [[1]] * len(prompts))

    monkeypatch.setattr(exactness, "generate", record)
    settings = Settings(batch=6, seed=40)
    tokens, accepted = exactness.decode(target, PROMPTS, None, Sampling(1.0), settings, None)
    assert seeds == [(6, 40), (6, 46), (4, 52)] and len(tokens) == 16 and accepted == 0


def test_a_rule_that_accepts_anything_fails_with_a_reason(target, drafter):
    status, document, page = report(target, drafter, PROMPTS, AcceptFirst(), SAMPLED)
    (check,) = document["checks"]
    assert status == 1 and not document["passed"]
    assert check["verdict"]["p_value"] < 1e-6 and check["failures"]
    assert "failed: the emitted tokens are" in page and "probable than the target's" in page
    assert "VERDICT: NOT LOSSLESS at T=1" in page


def test_a_rule_that_reuses_its_noise_fails_with_a_reason(target, drafter):
    status, _, page = report(target, drafter, PROMPTS, SameNoise(), SAMPLED)
    assert status == 1 and "noise is used again between steps" in page


def test_a_lossy_rule_is_measured_and_never_called_lossless(target, drafter):
    settings = Settings(temperatures=(0.0, 1.0), max_new_tokens=32)
    status, document, page = report(target, drafter, PROMPTS, Declared(), settings)
    assert status == 0
    for check in document["checks"]:
        assert check["passed"] is None and check["verdict"]["kind"] == "lossy"
        assert check["verdict"]["divergence"] > 2 * check["verdict"]["chance"]
    assert "LOSSY by design" in page and "VERDICT: LOSSY" in page
    assert "lossless" not in page


def test_wrong_greedy_tokens_fail_and_are_triaged(target, drafter, monkeypatch):
    generate = exactness.generate

    def faulty(target, prompts, drafter, *args, **kwargs):
        out = generate(target, prompts, drafter, *args, **kwargs)
        if drafter is not None:
            out.tokens[3][7] = (out.tokens[3][7] + 1) % 12
            del out.tokens[5][9:]
        return out

    monkeypatch.setattr(exactness, "generate", faulty)
    settings = Settings(temperatures=(0.0,), max_new_tokens=12)
    status, document, page = report(target, drafter, PROMPTS, None, settings)
    (check,) = document["checks"]
    assert status == 1 and check["verdict"]["identical"] == 14
    swapped, short = check["divergences"]
    assert (swapped["answer"], swapped["position"]) == (3, 7) and swapped["gap"] > TIE
    assert (short["answer"], short["position"]) == (5, 9) and short["gap"] is None
    assert "not the target's greedy choice" in page and "cut wrong" in page and "differs" in page
    # The same divergence is excused where rounding may close so large a gap.
    checks = check_pair(target, drafter, PROMPTS, None, settings, tie=2 * swapped["gap"])
    assert checks[0].verdict["ties"] == 1 and len(checks[0].failures) == 1


def test_bfloat16_gets_its_tolerance_from_measurement(target):
    half = dataclasses.replace(
        target, params=jax.tree.map(lambda w: w.astype(jnp.bfloat16), target.params)
    )
    long = [(p * 20)[:40] for p in PROMPTS[:3]]
    assert row_noise(target, long, 3) < 1e-5  # a cache of chunks is the same model
    tie, noise = rounding_tie(half, None, long)
    assert 0 < noise < 0.5 and tie == max(TIE, 4 * noise)
    assert rounding_tie(target, None, long) == (TIE, 0.0)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperatures", (), "temperatures"),
        ("temperatures", (-1.0,), "temperatures"),
        ("temperatures", (1.0, 1.0), "each once"),
        ("top_p", 0.0, "top_p"),
        ("alpha", 1.0, "alpha"),
        ("max_new_tokens", 0, "max_new_tokens"),
    ],
)
def test_settings_out_of_range_are_named(field, value, words):
    with pytest.raises(ValueError, match=words):
        Settings(**{field: value})


def test_what_cannot_be_checked_is_refused_before_decoding(target, drafter, monkeypatch):
    monkeypatch.setattr(exactness, "generate", None)
    with pytest.raises(ValueError, match="greedy"):
        check_pair(target, drafter, PROMPTS, "greedy", SAMPLED)
    with pytest.raises(ValueError, match="prompts"):
        check_pair(target, drafter, [], None, SAMPLED)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.verify", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_exit_statuses_from_the_command_line(tmp_path):
    file = tmp_path / "outcome.json"
    done = command(
        "--temperatures=0,1", "--count=2", "--max_new_tokens=12", f"--json={file}"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "VERDICT: lossless" in done.stdout
    assert json.loads(file.read_text())["passed"] is True
    for arguments, words in [
        (["--temperatures=warm"], "--temperatures"),
        (["--target=/nowhere"], "--target: /nowhere"),
        (["--drafter=/nowhere"], "--drafter: /nowhere"),
        (["--rule=nonsense"], "--rule: 'nonsense' is unknown"),
        (["--rule=greedy"], "--rule: rule 'greedy' decodes at temperature 0 only"),
        (["--top_p=2"], "--top_p"),
        (["--dtype=int8"], "dtype"),
        (["--prompts=/nowhere.jsonl"], "--prompts: /nowhere.jsonl"),
        (["surplus"], "surplus"),
    ]:
        done = command(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr + done.stdout
