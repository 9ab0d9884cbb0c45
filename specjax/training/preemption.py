"""SIGTERM, as sent before a machine is taken away: save, then leave with a status of its own."""

import contextlib
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


@contextlib.contextmanager
def noticing():
    """Yields due(step): whether to save and stop after that step, the same answer everywhere.

    Outside of it SIGTERM leaves at once, which loses nothing: stages other than training keep what
    they have on disk as they go. With several processes jax's own preemption service listens all
    the time, and all stop after the same step: the next one of training, if there is any.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_on_sigterm() -> None:
    """From now on SIGTERM raises `Preempted`, but where training is `noticing` it."""

    def leave(*_):
        raise Preempted("stopped by SIGTERM; the same command resumes")

    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, leave)
