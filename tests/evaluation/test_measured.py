"""What was measured is kept for a run that is stopped, and for nothing else."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.evaluation import measured as measured_module
from specjax.evaluation.measured import FOLDER, forget, measured, norms
from specjax.evaluation.records import MethodRun, TurnRecord


def counted(value=None):
    """(a measurement, the list of its calls)."""
    calls = []
    return lambda: calls.append(1) or value, calls


def test_a_measurement_is_made_once(tmp_path):
    measure, calls = counted({"times": (0.1, np.float32(0.5)), "counts": np.arange(3)})
    first = measured(tmp_path, "a/b T=0", {"prompts": (1, 2)}, measure)
    assert first == {"times": [0.1, 0.5], "counts": [0, 1, 2]}
    assert measured(tmp_path, "a/b T=0", {"prompts": [1, 2]}, measure) == first
    assert len(calls) == 1 and [p.name for p in (tmp_path / FOLDER).iterdir()] == ["a-b T=0.json"]
    measured(tmp_path, "a/b T=1", {"prompts": (1, 2)}, measure)
    assert len(calls) == 2
    forget(tmp_path)
    forget(tmp_path)  # nothing there is fine
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("other", [{"prompts": 1, "norms": [1.5]}, {"prompts": 1}, {}])
def test_other_circumstances_are_measured_anew(tmp_path, other):
    measure, calls = counted(1)
    measured(tmp_path, "x", {"prompts": 1, "norms": [1.25]}, measure)
    measured(tmp_path, "x", other, measure)
    measured(tmp_path, "x", other, measure)  # the newest is the one that is kept
    assert len(calls) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"circumstances": 1}', "\x00", "null"])
def test_a_file_that_is_not_whole_is_measured_anew(tmp_path, text):
    measure, calls = counted(1)
    measured(tmp_path, "x", {}, measure)
    (tmp_path / FOLDER / "x.json").write_text(text)
    assert measured(tmp_path, "x", {}, measure) == 1
    assert len(calls) == 2


def test_a_measurement_that_fails_leaves_nothing(tmp_path):
    def fails():
        raise SystemExit(75)

    with pytest.raises(SystemExit):
        measured(tmp_path, "x", {}, fails)
    measure, calls = counted(1)
    measured(tmp_path, "x", {}, measure)
    assert len(calls) == 1


def test_changed_code_is_measured_anew(tmp_path, monkeypatch):
    measure, calls = counted(1)
    before = measured_module.code()
    measured(tmp_path, "x", {}, measure)
    monkeypatch.setattr(measured_module, "code", lambda: before + "'")
    measured(tmp_path, "x", {}, measure)
    assert len(calls) == 2


def test_norms_tell_weights_apart():
    params = {"a": jnp.ones((3, 4)), "ids": jnp.arange(3), "b": [jnp.ones(2, jnp.bfloat16)]}
    before = norms(params)
    np.testing.assert_allclose(before, [12**0.5, 2**0.5, 5**0.5], rtol=1e-6)
    assert before == norms(params)
    assert before != norms(params | {"ids": jnp.array([0, 1, 3])})


def test_a_run_survives_json():
    turn = TurnRecord(7, "c", 0, (1, 2, 3), "abc", (1, 2), (0.1, 0.3))
    run = MethodRun(
        "fasteagle/best", "stdlib", 0.0, 1, 2, "greedy", True, 7, 3, [turn], 0.1, 0.2, 0.3,
        5, 6, 7.5, {"kind": "identical", "checked": 1, "identical": 1, "ties": 0}, 8.0, 9.0,
    )  # fmt: skip
    assert MethodRun.from_json(json.loads(json.dumps(run.to_json()))) == run
