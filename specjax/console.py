"""Where text goes: colour and the width of a window on a terminal, plain and wide elsewhere."""

import os
from collections.abc import Iterable, Sequence
from typing import IO

from rich.box import MARKDOWN
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

PLAIN_WIDTH = 120
"""Columns assumed when the output is no terminal and COLUMNS is not set."""


def make_console(file: IO[str] | None = None, soft_wrap: bool = False) -> Console:
    """A console on `file` or standard output; `soft_wrap` leaves long lines to the terminal."""
    console = Console(file=file, highlight=False, markup=False, soft_wrap=soft_wrap)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH
    return console


def print_rows(
    console: Console, headings: str, rows: Iterable[Sequence[str]], title: str | None = None
) -> None:
    """Prints a Markdown table: cells under headings separated by "|", the first column left.

    It is as wide as its cells, whatever the console's width: what is cut cannot be pasted.
    """
    table = Table(title=title, title_justify="left", box=MARKDOWN)
    for index, heading in enumerate(headings.split("|")):
        table.add_column(heading.strip(), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width, console.width = console.width, max(console.width, natural_width(table, console))
    console.print(table)
    console.width = width


def natural_width(table: Table, console: Console) -> int:
    """Columns that a table takes when nothing is wrapped."""
    endless = console.options.update(width=10_000)
    return Measurement.get(console, endless, table).maximum
