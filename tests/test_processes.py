"""Real processes: they train together, one is killed, and the run goes on where it was saved."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import agreeing
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from specjax import processes
from specjax.data.feature_cache import FeatureCache
from specjax.preemption import STATUS

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "training" / "one_of_two.py"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def environment(devices: int) -> dict:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    flags = f"--xla_force_host_platform_device_count={devices}"
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return os.environ | cache | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths}


def together(folder, count=2, mesh="2,1,1", devices=1, die_at=(), seconds=240):
    """Starts the processes of one run; (exit status, what it printed) of each."""
    folder.mkdir(exist_ok=True)
    port, extra = free_port(), list(map(str, die_at))
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, folder, str(i), str(count), str(port), mesh, *extra],
            env=environment(devices), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(count)
    ]  # fmt: skip
    ends, deadline = [], time.monotonic() + seconds
    for process in started:
        out, _ = process.communicate(timeout=max(deadline - time.monotonic(), 1))
        ends.append((process.returncode, out))
    return ends


@pytest.mark.slow
def test_two_processes_that_see_different_things_agree(tmp_path):
    whole = FeatureCache(
        tmp_path / "features", agreeing.target(), agreeing.TAPS, agreeing.rows(), 2
    )
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "agreeing.py", tmp_path, str(i), str(port)],
            env=environment(1), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    for index, out in enumerate([process.communicate(timeout=300)[0] for process in started]):
        found = json.loads(out.partition("found ")[2].partition("\n")[0])
        assert found.pop("everyones") == ["é", "éé"]
        assert found.pop("same folder") is None
        assert found.pop("own folder") == (
            f"ValueError: --workdir: processes [1] do not see {tmp_path}/of-{index}, as process 0 "
            "has it"
        )
        assert found.pop("none fail") == f"of {index}"
        assert found.pop("one fails") == "OSError: process 1: shard: missing"
        assert found.pop("all fail") == "OSError: shard: missing"
        assert found.pop("the first fails") == "OSError: shard: missing"
        everything = ["array.npz", "model.safetensors", "text"]
        assert found.pop("written") == (everything if index == 0 else [])
        np.testing.assert_array_equal(found.pop("taps"), whole.batch([4])["taps"])
        assert found.pop("asked") == [False] * 3 + [True] * 3
        assert not found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features", "of-0", "of-1"]


def weights(folder):
    return load_file(folder / "drafter" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_one_of_them_killed(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for status, out in together(whole):
        assert status == 0, out
    # Process 1 is killed before the fourth step; the other ends too, with an error, in time.
    (alive, out), (killed, _) = together(cut, die_at=[3])
    assert killed == -9 and alive != 0, out
    assert sorted(p.name for p in (cut / "checkpoints" / "fasteagle").iterdir()) == ["2"]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(cut, elsewhere)
    ends = together(cut)
    assert [status for status, _ in ends] == [0, 0], ends
    assert "resuming at step 2 of 6" in ends[0][1] and "resuming" not in ends[1][1]
    for name, weight in weights(whole).items():
        np.testing.assert_array_equal(weights(cut)[name], weight, err_msg=name)
    # Only process 0 writes, once: a row a step, the probe's, nothing twice.
    rows = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4, 5, 6]
    expected = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows if "loss" in r] == [r["loss"] for r in expected if "loss" in r]
    # The same run on other devices: one process with one, and with four in another mesh.
    for count, mesh in ((1, "1,1,1"), (4, "1,2,2")):
        other = tmp_path / f"on-{count}"
        shutil.copytree(elsewhere, other)
        ((status, out),) = together(other, count=1, mesh=mesh, devices=count)
        assert status == 0 and "resuming at step 2 of 6" in out, out
        for name, weight in weights(whole).items():
            np.testing.assert_allclose(weights(other)[name], weight, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_and_saves_all(tmp_path):
    ends = together(tmp_path, die_at=[3, "SIGTERM"])
    assert [status for status, _ in ends] == [STATUS, STATUS], ends
    (saved,) = (tmp_path / "checkpoints" / "fasteagle").iterdir()
    assert 3 < int(saved.name) < 60


@pytest.mark.slow
def test_a_missing_process_is_an_error_and_not_a_hang(tmp_path):
    command = [
        sys.executable, "-m", "experiments.main", "--config=configs/fasteagle.py:smoke",
        f"--workdir={tmp_path}", "--distributed", f"--coordinator=localhost:{free_port()}",
        "--num_processes=2", "--process_id=1", "--timeout=5",
    ]  # fmt: skip
    found = subprocess.run(
        command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=120
    )
    assert found.returncode != 0
    assert not any(tmp_path.iterdir())


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    with processes.only_writer(tmp_path):
        with pytest.raises(ValueError, match=f"another run is writing here .*{os.getpid()}"):
            with processes.only_writer(tmp_path):
                pass
    with processes.only_writer(tmp_path):
        pass


def test_one_process_agrees_with_itself():
    assert processes.first(lambda: {"a": [1, 2]}) == {"a": [1, 2]}
    with pytest.raises(ValueError, match="as it was"):
        processes.first(lambda: (_ for _ in ()).throw(ValueError("as it was")))
    processes.check_same("--config", "text")
    assert processes.is_first()
