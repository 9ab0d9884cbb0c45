"""What TensorBoard is shown is what metrics.jsonl holds, resumed runs included."""

import json
import struct
import sys

import numpy as np
import pytest
from toys import toy_target

import specjax
from specjax.evaluation.calibrate import calibrate
from specjax.training import metrics
from specjax.training.drafter import TauProbe
from specjax.training.metrics import MetricsLog


def shown(folder) -> dict:
    """{(name, step): value} of one run as TensorBoard reads it: a new session hides later steps."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at + 12 < len(data):  # length, its checksum, a record, its checksum
            (size,) = struct.unpack_from("<Q", data, at)
            if at + size + 16 > len(data):
                break
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.session_log.status == SessionLog.START:
                found = {k: v for k, v in found.items() if k[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def logged(log, stage) -> dict:
    """The same of metrics.jsonl."""
    return {
        (name, row["step"]): np.float32(value)
        for row in log.rows()
        if row["stage"] == stage
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, int | float)
    }


def write(log, steps, scale=1.0):
    for step in steps:
        log.write("train/a", step, loss=scale / step, by_depth=[1.0, 2.0])
        log.write("train/b", step, loss=2 * scale / step, tau=1.5)


def test_what_is_not_finite_is_null_and_said(tmp_path, capsys):
    """JSON has neither NaN nor infinity; rows of older files that hold them are mended too."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "stage": "a", "tau": NaN}\n')
    log = MetricsLog(path)
    log.rewind("a", 1)
    log.write("a", 2, loss=float("inf"), tau=None, by_depth=[0.5, float("nan")])
    rows = [json.loads(text, parse_constant=pytest.fail) for text in path.read_text().splitlines()]
    rows[1].pop("time")
    assert rows == [
        {"step": 1, "stage": "a", "tau": None},
        {"step": 2, "stage": "a", "loss": None, "tau": None, "by_depth": [0.5, None]},
    ]  # fmt: skip
    assert "a: step 2: not finite, written as null: loss, by_depth\n" in capsys.readouterr().out


def test_tensorboard_shows_what_the_log_holds(tmp_path):
    pytest.importorskip("tensorboardX")
    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)
    for stage in ("train/a", "train/b"):
        log.rewind(stage, 0)
    write(log, range(1, 8))
    log.mirror.close()
    lost = next((tmp_path / "tensorboard" / "train/a").glob("events*"))
    lost.write_bytes(lost.read_bytes()[:-40])  # a killed run's last second
    resumed = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)
    resumed.rewind("train/a", 4)  # b goes on where it was
    for step in (5, 6):
        resumed.write("train/a", step, loss=9.0)
    resumed.mirror.close()
    for stage in ("train/a", "train/b"):
        assert shown(tmp_path / "tensorboard" / stage) == logged(resumed, stage)
    last = {step: v for (_, step), v in shown(tmp_path / "tensorboard" / "train/a").items()}
    assert sorted(last) == [1, 2, 3, 4, 5, 6] and last[5] == 9.0


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(metrics, "is_first", lambda: False)
    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)
    log.rewind("train/a", 0)
    write(log, (1,))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tensorboard_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"config.tensorboard.*specjax\[tensorboard\]"):
        MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)
    MetricsLog(tmp_path / "metrics.jsonl").write("a", 1, loss=1.0)  # not needed, not asked for


def test_no_round_is_no_tau():
    """An answer of one token is prefill's: neither probe nor calibration makes a number of it."""
    target = toy_target()
    drafter = specjax.init_drafter("prompt_lookup", target)
    probe = TauProbe([[1, 2, 3]], max_new_tokens=1)
    assert probe(target, drafter) is None
    assert TauProbe([[1, 2, 3]], max_new_tokens=4)(target, drafter) >= 1
    with pytest.raises(ValueError, match="calibrate.prompts: every answer to these 1 ends after"):
        calibrate(target, drafter, [{}], probe, "x")
