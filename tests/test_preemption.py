"""Asking whether to stop: jax's service, which answers yes at one number only, stood in for."""

import signal

import jax
import pytest
from jax.experimental import multihost_utils

from specjax import preemption


class Service:
    """Says yes at the question after the last one that was asked when the signal came."""

    def __init__(self):
        self.last, self.agreed = 0, None

    def signal(self):
        self.agreed = self.last + 1

    def reached(self, number: int) -> bool:
        self.last = number
        return number == self.agreed


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", service.reached)
    yield service
    preemption._asked.clear()


def stage(steps: int) -> list[bool]:
    with preemption.noticing():
        return [preemption.due() for _ in range(steps)]


def test_a_signal_between_stages_stops_the_next_one(service):
    assert stage(5) == [False] * 5
    service.signal()
    assert stage(2) == [True, True]


def test_a_signal_at_the_last_step_stops_what_comes_after(service):
    assert stage(5) == [False] * 5
    service.signal()
    assert stage(1) == [True]
    with pytest.raises(preemption.Preempted, match="stopped by SIGTERM, it is saved") as stopped:
        preemption.stop_if_due("it is saved")
    assert stopped.value.code == preemption.STATUS
    preemption.stop_if_due("nobody asked again")


def test_one_process_notices_only_inside():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.noticing():
        assert not preemption.due()
        signal.raise_signal(signal.SIGTERM)
        assert preemption.due()
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(preemption.Preempted):
        preemption.stop_if_due("the last step was the one")
