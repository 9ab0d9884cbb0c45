"""SIGTERM, as sent before a machine is taken away: save, then leave with a status of its own."""

import contextlib
import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

STATUS = 75
"""Exit status of a run that was stopped and saved: the same command resumes it (EX_TEMPFAIL)."""


class Preempted(SystemExit):
    """The run has been asked to stop; what it had is on disk."""

    def __init__(self, message: str):
        super().__init__(STATUS)
        self.message = message

    def __str__(self):
        return self.message


_asked = threading.Event()
_questions = itertools.count(1)


def due() -> bool:
    """Whether to save and stop now: the same answer everywhere, so every process has to ask.

    With several processes jax's preemption service listens all the time and lets all stop at the
    same question, the one after the last that any of them had asked when the signal came. It says
    so at that number only: numbers never start anew, and the answer is kept.
    """
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_questions)):
        _asked.set()
    return _asked.is_set()


def stop(message: str):
    """Raises `Preempted`."""
    _asked.clear()
    raise Preempted(message)


def stop_if_due(done: str) -> None:
    """Where all that is done is on disk: raises `Preempted`, which names it, if it is `due`."""
    if due():
        stop(f"stopped by SIGTERM, {done}; the same command resumes")


@contextlib.contextmanager
def noticing():
    """SIGTERM waits in here until somebody asks whether to stop is `due`.

    Outside of it a single process leaves at once: stages other than training keep what they have on
    disk as they go, the benchmark task by task. Several processes ask between stages and batches.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _asked.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_on_sigterm() -> None:
    """From now on SIGTERM raises `Preempted`, but where training is `noticing` it."""

    def leave(*_):
        raise Preempted("stopped by SIGTERM; the same command resumes")

    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, leave)
