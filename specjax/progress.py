"""What a person watching sees: one progress line with the remaining time, on process 0 only."""

import contextlib
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specjax.processes import is_first


def say(message: str = ""):
    """Prints on process 0."""
    if is_first():
        print(message, flush=True)


def duration(seconds: float) -> str:
    """Seconds as "42 s" or "3 min 20 s"."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


@contextlib.contextmanager
def progress(title: str, total: int, done: int = 0):
    """Yields advance(count=1, note=""): a live bar on a terminal, else a line every 20%."""
    if not is_first() or total <= done:
        yield lambda count=1, note="": None
        return
    if sys.stdout.isatty():
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=Console()) as bar:
            task = bar.add_task(title, total=total, completed=done, note="")

            def advance(count=1, note=""):
                bar.update(task, advance=count, note=note)

            yield advance
        return
    start, first, shown = time.monotonic(), done, 5 * done // total

    def advance(count=1, note=""):
        nonlocal done, shown
        done += count
        if 5 * done // total > shown:
            shown = 5 * done // total
            left = (time.monotonic() - start) * (total - done) / max(done - first, 1)
            print(f"{title}: {done}/{total}, {duration(left)} left {note}".rstrip(), flush=True)

    yield advance
