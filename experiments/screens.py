"""Where a streamed answer goes: a scrolling terminal, two panes side by side, or a pipe.

A screen's `play` decodes the answers, each alone, and shows them: on a terminal text is shaded by
the draft depth that proposed it and a line below tells how it goes; a pipe gets the last answer's
bare text. The first of several answers is plain decoding's, which the others are measured against.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import IO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from specjax.console import make_console
from specjax.shades import SHADES, terminal_style
from specjax.streaming import Answer, Piece

SIDE_BY_SIDE = 88  # columns from which two answers stand side by side
FRAMES = 15  # redraws a second, at most: drawing must not outweigh decoding

LEAD = 0.05  # seconds of decoding by which one answer may be ahead of another beside it

Stop = Callable[[], bool]
"""Whether the answers are to end where they are."""

# A model may write what a terminal would take for commands; they are shown as symbols.
_CONTROLS = {n: 0x2400 + n for n in range(32) if chr(n) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421} | {n: 0xFFFD for n in range(0x80, 0xA0)}


# ---- what is measured ----------------------------------------------------------------------------


def tau(answers: Sequence[Answer]) -> float | None:
    """Tokens a round, the prefill left out; None before the first round."""
    rounds = [count for answer in answers for count in answer.accept_lengths[1:]]
    return sum(rounds) / len(rounds) if rounds else None


def tokens_per_s(answers: Sequence[Answer]) -> float | None:
    """Prefill included, compiling left out; None before the first token."""
    seconds = sum(answer.seconds for answer in answers)
    return sum(len(answer.tokens) for answer in answers) / seconds if seconds else None


def measures(
    name: str, answers: Sequence[Answer], vanilla: Sequence[Answer] | None = None
) -> list[str]:
    """ "fasteagle", "128 tokens", "412 tokens/s", "tau 2.41", "1.18x vanilla", as far as known."""
    tokens = sum(len(answer.tokens) for answer in answers)
    parts = [name, f"{tokens} token{'s' * (tokens != 1)}"]
    speed, rounds = tokens_per_s(answers), tau(answers)
    if speed is not None:
        parts.append(f"{speed:.0f} tokens/s")
    if name != "vanilla" and rounds is not None:
        parts.append(f"tau {rounds:.2f}")
    plain = tokens_per_s(vanilla) if vanilla else None
    if speed is not None and plain is not None:
        parts.append(f"{speed / plain:.2f}x vanilla")
    return parts


def status(parts: Sequence[str], width: int) -> Text:
    """The parts on one line; what does not fit is left out, the name first."""
    separator = " · "
    while len(separator.join(parts)) > width and len(parts) > 1:
        parts = parts[1:]
    return Text(separator.join(parts), style="dim", no_wrap=True, overflow="ellipsis")


def legend(depth: int) -> Text:
    """What the shades mean: one swatch a draft depth."""
    line = Text("draft depth", style="dim")
    for level in range(1, min(depth, SHADES) + 1):
        more = "+" if level == SHADES < depth else ""
        line.append(" ").append(f"{level}{more}".center(2), terminal_style(level))
    return line


# ---- screens -------------------------------------------------------------------------------------


class Lines:
    """Shaded text broken into lines of a width as it grows; only the last line still changes."""

    def __init__(self, console: Console, width: int):
        self._console, self._width = console, width
        self.whole: list[Text] = []
        self.last = Text()

    def add(self, pieces: Sequence[Piece]) -> None:
        for text, depth in pieces:
            self.last.append(text.translate(_CONTROLS), terminal_style(depth))
        *whole, self.last = self.last.wrap(self._console, self._width, overflow="fold")
        self.whole += whole

    def take(self) -> list[Text]:
        """The lines that have become whole since the last call."""
        whole, self.whole = self.whole, []
        return whole


class Scroll:
    """A terminal: answers below each other, the line on how it goes under the newest."""

    def __init__(self, console: Console):
        self.console = console

    def say(self, *parts: str) -> None:
        self.console.print(" · ".join(parts), style="dim")

    def legend(self, depth: int) -> None:
        self.console.print(legend(depth))

    def working(self, text: str):
        """A context: something is under way that is no decoding."""
        return self.console.status(Text(text, style="dim"))

    def play(self, names: Sequence[str], answers: Sequence[Answer], before: str, stop: Stop):
        for index, (name, answer) in enumerate(zip(names, answers, strict=True)):
            if stop():
                break
            self._play(name, answer, answers[:1] if index else None, before, stop)

    def _play(self, name, answer, vanilla, before, stop) -> None:
        console, lines = self.console, Lines(self.console, self.console.width)
        below = lambda: status(measures(name, [answer], vanilla), console.width)  # noqa: E731
        lines.add([(before, 0)])
        frames = Frames()
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while not stop() and (pieces := next(answer, None)) is not None:
                lines.add(pieces)
                if frames.due():
                    for line in lines.take():
                        print_line(console, line)
                    live.update(Group(lines.last, below()), refresh=True)
        for line in [*lines.take(), lines.last, below()]:
            print_line(console, line)


class Panes(Scroll):
    """A wide terminal: answers side by side, as many of their last lines as it is high."""

    def play(self, names, answers, before, stop):
        if len(answers) == 1:
            return super().play(names, answers, before, stop)
        console = self.console
        width = (console.width - 3 * (len(answers) - 1)) // len(answers)
        panes = [Lines(console, width) for _ in answers]
        for pane in panes:
            pane.add([(before, 0)])

        def grid(height: int) -> Table:
            table = Table.grid(padding=(0, 3, 0, 0), pad_edge=False)
            for _ in panes:
                table.add_column(width=width, no_wrap=True, overflow="ignore")
            table.add_row(*(Text(name, style="bold") for name in names))
            rows = [[*pane.whole, pane.last][-height:] for pane in panes]
            table.add_row(*(Text("\n").join(lines) for lines in rows))
            told = [
                measures(name, [answer], answers[:1] if index else None)[1:]
                for index, (name, answer) in enumerate(zip(names, answers, strict=True))
            ]
            table.add_row(*(status(parts, width) for parts in told))
            return table

        frames = Frames()
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for index, pieces in race(answers):
                panes[index].add(pieces)
                if frames.due():
                    live.update(grid(max(1, console.height - 3)), refresh=True)
                if stop():
                    break
        console.print(grid(0))


class Pipe:
    """No terminal: the last answer's text to standard output, all else to standard error."""

    def __init__(self, out: IO[str], errors: IO[str]):
        self.out, self.errors = out, errors

    def say(self, *parts: str) -> None:
        print(*parts, sep=", ", file=self.errors, flush=True)

    def legend(self, depth: int) -> None:
        """Nothing is shaded."""

    def working(self, text: str):
        """Nobody watches."""
        return nullcontext()

    def play(self, names, answers, before, stop):
        for index, answer in enumerate(answers):
            while not stop() and (pieces := next(answer, None)) is not None:
                if index == len(answers) - 1:
                    self._write("".join(text for text, _ in pieces))
        self._write("\n")
        for index, (name, answer) in enumerate(zip(names, answers, strict=True)):
            self.say(*measures(name, [answer], answers[:1] if index else None))

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


class Frames:
    """Tells when the next redraw is due."""

    def __init__(self):
        self._last = 0.0

    def due(self) -> bool:
        now = time.perf_counter()
        if now - self._last < 1 / FRAMES:
            return False
        self._last = now
        return True


def race(answers: Sequence[Answer]) -> Iterator[tuple[int, list[Piece]]]:
    """Decodes by turns whichever answer is behind by its own clock: (index, pieces) of each round.

    Only one runs at a time, so each is timed alone; yet on the screen they keep their true pace.
    """
    running = dict(enumerate(answers))
    while running:
        index = min(running, key=lambda i: running[i].seconds)
        others = [answer.seconds for i, answer in running.items() if i != index]
        until = min(others, default=float("inf")) + LEAD
        while running[index].seconds < until:
            pieces = next(running[index], None)
            if pieces is None:
                del running[index]
                break
            yield index, pieces


def print_line(console: Console, line: Text) -> None:
    """A line that has been broken to fit, as it is."""
    console.print(line, no_wrap=True, overflow="ignore", crop=False)


def open_screen(out: IO[str] | None = None, errors: IO[str] | None = None):
    """The screen that suits an output."""
    out, errors = out or sys.stdout, errors or sys.stderr
    console = make_console(out)
    if not out.isatty() or console.is_dumb_terminal:
        return Pipe(out, errors)
    return (Panes if console.width >= SIDE_BY_SIDE else Scroll)(console)
