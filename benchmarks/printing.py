"""Tables of the benchmarks, in Markdown so that they can be pasted."""

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table


def wide_console() -> Console:
    """A console that does not fold tables when the output is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    return console


def print_rows(console: Console, title: str, headings: str, rows: list[tuple]) -> None:
    """Prints cells under headings separated by "|", the first column to the left."""
    table = Table(title=title, title_justify="left", box=MARKDOWN)
    for index, heading in enumerate(headings.split("|")):
        table.add_column(heading.strip(), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
