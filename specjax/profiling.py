"""Profiler traces on request: a few steps or rounds of every stage, for xprof or Perfetto.

The parts of a round and of a step carry names (`draft`, `verify`, `accept`, `commit`, `layer_i`,
`loss`, `lm_head`), which the traces show.
"""

import contextlib
import pathlib

import jax

SKIPPED = 2
"""Steps let pass first: they compile, or wait for what does."""

_request: tuple[pathlib.Path, int] | None = None


def enable(folder, steps: int) -> None:
    """From now on every stage traces `steps` steps into `folder`/STAGE; 0 turns it off."""
    global _request
    _request = (pathlib.Path(folder), steps) if steps else None


class StageTrace:
    """Starts and stops the trace of one stage; call it ahead of every step."""

    def __init__(self, stage: str):
        self.stage, self.seen, self.tracing = stage, 0, False

    def __call__(self) -> None:
        if _request is None:
            return
        folder, steps = _request
        if self.seen == SKIPPED:
            jax.profiler.start_trace(str(folder / self.stage.replace("/", "-")))
            self.tracing = True
        elif self.seen == SKIPPED + steps:
            self.close()
        self.seen += 1

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False


@contextlib.contextmanager
def traced(stage: str):
    """Traces what is done within, if asked for; yields how many repetitions are worth tracing."""
    if _request is None:
        yield 0
        return
    folder, steps = _request
    with jax.profiler.trace(str(folder / stage.replace("/", "-"))):
        yield steps
