"""Resuming, falling back and stopping: what a training run must survive."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax.training.checkpoints import Checkpoints
from specjax.training.loop import fit
from specjax.training.metrics import MetricsLog
from specjax.training.state import create, make_step

OPTIMIZER = optax.adam(0.1)


def loss_fn(params, frozen, batch, step):
    loss = jnp.mean((params["w"] * batch - frozen) ** 2)
    return loss, {"w_mean": params["w"].mean()}


STEP = make_step(loss_fn, OPTIMIZER)


def batch(step, state=None):
    return jnp.asarray(np.random.default_rng(step).normal(size=5), jnp.float32)


def run(folder, steps, batch_fn=batch, every=3):
    checkpoints = Checkpoints(folder / "checkpoints")
    log = MetricsLog(folder / "metrics.jsonl")
    state = create({"w": jnp.ones(5)}, OPTIMIZER)
    return fit(
        "train/x", state, jnp.float32(2.0), STEP, batch_fn, steps, checkpoints=checkpoints,
        checkpoint_every=every, metrics=log, log_every=2, tokens_per_step=5,
    )  # fmt: skip


class Killed(Exception):
    pass


def test_a_resumed_run_is_bit_identical(tmp_path):
    whole = run(tmp_path / "whole", 10)

    def dies(step, state):
        if step == 7:
            raise Killed
        return batch(step)

    with pytest.raises(Killed):
        run(tmp_path / "cut", 10, dies)
    resumed = run(tmp_path / "cut", 10)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [
        [(r["step"], r["loss"]) for r in MetricsLog(tmp_path / name / "metrics.jsonl").rows()]
        for name in ("whole", "cut")
    ]
    assert rows[0] == rows[1]


def test_seconds_count_the_steps_of_every_process(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, rate in ((10, 100.0), (20, 50.0)):  # 10 steps of 5 tokens each
        log.write("a", step, loss=1.0, tokens_per_s=rate)
    log.write("a", 20, tau=2.0)
    log.write("b", 10, tokens_per_s=1.0)
    assert log.seconds("a", 5) == pytest.approx(0.5 + 1.0)
    log.rewind("a", 15)  # resumed at step 15: its next row is for the steps since 10
    log.write("a", 20, tokens_per_s=25.0)
    assert log.seconds("a", 5) == pytest.approx(0.5 + 2.0)
    assert log.seconds("c", 5) == 0


def damage(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.stat().st_size > 50:
            path.write_bytes(path.read_bytes()[:10])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_falls_back_to_the_last_whole_one(tmp_path, capsys):
    whole = run(tmp_path / "whole", 9)
    run(tmp_path / "cut", 6)
    newest = tmp_path / "cut" / "checkpoints" / "6"
    damage(newest)
    resumed = run(tmp_path / "cut", 9)
    np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])
    said = capsys.readouterr().out
    assert f"{newest} is damaged" in said and "resuming at step 3" in said


def test_where_no_checkpoint_loads_nothing_is_lost(tmp_path):
    run(tmp_path, 6)
    before = contents(tmp_path)
    wider = create({"w": jnp.ones(5), "b": jnp.ones(5)}, OPTIMIZER)  # another tree of parameters
    with pytest.raises(ValueError, match="no checkpoint loads.*step 6: .*step 3: "):
        Checkpoints(tmp_path / "checkpoints").restore(wider)
    assert contents(tmp_path) == before
    for step in (3, 6):
        damage(tmp_path / "checkpoints" / str(step))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path / 'checkpoints'}: no checkpoint loads"):
        run(tmp_path, 9)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_another_process_cannot_load_is_no_ones(tmp_path, monkeypatch):
    run(tmp_path, 6)
    answers, said = iter([False, True]), []
    monkeypatch.setattr(
        "specjax.training.checkpoints.everyones", lambda holds: [holds, holds and next(answers)]
    )
    state = Checkpoints(tmp_path / "checkpoints").restore(
        create({"w": jnp.ones(5)}, OPTIMIZER), said.append
    )
    assert int(state.step) == 3 and "another process" in said[0] and len(said) == 1
    assert Checkpoints(tmp_path / "checkpoints").latest() == 3


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    def poisoned(step, state):
        return batch(step) * (jnp.nan if step == 4 else 1.0)

    with pytest.raises(FloatingPointError, match="train/x: step 5: loss nan.*checkpoint: step 3"):
        run(tmp_path, 10, poisoned)
    assert Checkpoints(tmp_path / "checkpoints").latest() == 3


def test_metrics_drop_a_half_written_last_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("a", 1, loss=1.0)
    log.write("a", 2, loss=0.5)
    log.write("b", 9, loss=0.1)
    with log.path.open("a") as file:
        file.write('{"step": 3, "sta')
    log.rewind("a", 1)
    assert [(r["stage"], r["step"]) for r in log.rows()] == [("a", 1), ("b", 9)]


def test_a_damaged_line_of_the_metrics_is_named_and_kept(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("a", 1, loss=1.0)
    with log.path.open("a") as file:
        file.write('{"step": 2, "sta\n')
    log.write("a", 3, loss=1.0)
    before = log.path.read_text()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        log.rewind("a", 1)
    assert log.path.read_text() == before


@pytest.mark.slow
def test_sigkill_and_resume_is_bit_identical(tmp_path):
    """A real recipe, killed with SIGKILL in the middle of training, then run again."""
    root = pathlib.Path(__file__).resolve().parents[2]

    def command(folder):
        return [
            sys.executable, "-m", "experiments.main", "--config=configs/builtin_target.py:smoke",
            f"--workdir={folder}", "--config.checkpoint_every=4", "--config.log_every=1",
        ]  # fmt: skip

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole), cwd=root, check=True, capture_output=True)
    process = subprocess.Popen(
        command(cut), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    saved = cut / "checkpoints" / "pretrain" / "8"
    deadline = time.time() + 600
    while not saved.is_dir():
        assert process.poll() is None and time.time() < deadline, "never reached step 8"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (cut / "model" / "model.safetensors").exists(), "killed too late"
    resumed = subprocess.run(
        command(cut), cwd=root, check=True, capture_output=True, text=True
    ).stdout
    assert "pretrain: resuming at step" in resumed
    a, b = (f / "model" / "model.safetensors" for f in (whole, cut))
    assert a.read_bytes() == b.read_bytes()
    losses = [
        [(r["step"], r["loss"]) for r in map(json.loads, lines) if "loss" in r]
        for lines in ((f / "metrics.jsonl").read_text().splitlines() for f in (whole, cut))
    ]
    assert losses[0] == losses[1]
