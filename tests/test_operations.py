"""A run as a machine's owner sees it: stopped, resumed, traced, started twice."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from specjax import processes
from specjax.evaluation.results import read_results
from specjax.preemption import STATUS

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMAND = [
    sys.executable, "-m", "experiments.main", "--config=configs/eagle3.py:smoke",
    "--config.train.steps=30", "--config.train.batch_size=2", "--config.train.log_every=1",
    "--config.train.checkpoint_every=0", "--config.train.tau_every=0", "--config.data.count=4",
    "--config.data.batch=4", "--config.data.max_new_tokens=8", "--config.data.length=64",
    "--config.eval.prompts=2", "--config.eval.max_new_tokens=8", "--config.eval.timing_repeats=1",
    "--config.eval.temperatures=(0.0,)", "--config.calibrate.prompts=0",
    # Less to compile:
    "--config.target.scan_layers=True", "--config.drafters.eagle3.init.steps=1",
    "--config.drafters.eagle3.tree.draft_depth=1", "--config.drafters.eagle3.tree.top_k=1",
    "--config.drafters.eagle3.tree.total_nodes=0",
]  # fmt: skip


def start(folder, cache, *arguments) -> subprocess.Popen:
    """A run under way; compiled programs are shared by the runs of a test."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [*COMMAND, f"--workdir={folder}", *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process) -> tuple[str, str]:
    """(standard output, standard error) of a run that must succeed."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out, err


def losses(folder) -> list[tuple[int, float]]:
    """(step, loss) of the training rows written so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # the last may be half
    return [(r["step"], r["loss"]) for r in map(json.loads, lines) if "loss" in r]


def wait_for(process, condition):
    deadline = time.time() + 600
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_ends_as_if_nothing_had_happened(tmp_path):
    """Stopped in the middle of training, with no checkpoint but the one that the stop makes."""
    whole, cut, cache = tmp_path / "whole", tmp_path / "cut", tmp_path / "cache"
    finish(start(whole, cache, "--profile=2"))
    process = start(cut, cache)
    wait_for(process, lambda: len(losses(cut)) >= 3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == STATUS, err
    assert "stopped by SIGTERM, saved at step" in out
    stopped = losses(cut)[-1][0]
    assert 3 <= stopped < 30 and not (cut / "drafters").exists(), "stopped too late"

    out, _ = finish(start(cut, cache))
    assert f"train/eagle3: resuming at step {stopped} of 30" in out
    assert losses(whole) == losses(cut)
    weights = [(f / "drafters" / "eagle3" / "model.safetensors").read_bytes() for f in (whole, cut)]
    assert weights[0] == weights[1]
    rows = [read_results(f / "results.json")["rows"] for f in (whole, cut)]
    for a, b in zip(*rows, strict=True):
        for field in ("method", "tau", "new_tokens", "rounds", "acceptance_by_depth", "lossless"):
            assert a[field] == b[field]
    answers = [sorted((f / "answers").glob("*.jsonl")) for f in (whole, cut)]
    texts = [
        [json.loads(line)["choices"][0]["turns"] for line in file.open()]
        for files in answers
        for file in files
    ]
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]
    # The uninterrupted run was traced: every stage left a file in which its parts are named.
    training = b"".join(p.read_bytes() for p in (whole / "profile/train-eagle3").rglob("*.pb"))
    assert b"loss" in training and b"lm_head" in training
    decoding = [p for p in (whole / "profile").iterdir() if "train" not in p.name]
    traced = b"".join(p.read_bytes() for folder in decoding for p in folder.rglob("*.pb"))
    for scope in (b"draft", b"verify", b"accept", b"commit"):
        assert scope in traced


@pytest.mark.slow
def test_a_second_run_on_a_folder_is_refused_by_name(tmp_path):
    with processes.only_writer(tmp_path):
        process = start(tmp_path, tmp_path / "cache")
        _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, STATUS)
    assert f"{tmp_path}: another run is writing here (process {os.getpid()} of " in err
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "data").exists()
