"""The result rows as a table: for a terminal, for a pipe, for a README.

One column is declared once, as the text of its cells; the printed table, the Markdown one and the
report's HTML one are three ways to lay the same columns out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from rich.box import Box
from rich.table import Table
from rich.text import Text

from specjax.console import make_console, natural_width


def _nothing(row: dict) -> str:
    return ""


@dataclass(frozen=True)
class Column:
    """A heading, the text of a cell, what may stand below or beside it, and whether it is bad."""

    heading: str
    text: Callable[[dict], str]
    detail: Callable[[dict], str] = _nothing
    bad: Callable[[dict], bool] = lambda row: False
    left: bool = False


def setting(row: dict) -> str:
    """Task and temperature, and the batch where it is not 1: "gsm8k T=0"."""
    batch = f" B={row['batch']}" if row["batch"] != 1 else ""
    return f"{row['task']} T={row['temperature']:g}{batch}"


def verdict(row: dict) -> str:
    """The losslessness verdict in a word or two: "80/80", "79/80 + 1 tie", "p=0.43", "lossy"."""
    if row["method"] == "vanilla":
        return "reference"
    lossless = row["lossless"]
    if lossless["kind"] == "lossy":
        return "lossy"
    if lossless["kind"] == "distribution":
        p = lossless["p_value"]
        return "p<0.001" if p < 0.001 else f"p={p:.2g}"
    ties = lossless["ties"]
    more = f" + {ties} tie{'s' if ties > 1 else ''}" if ties else ""
    return f"{lossless['identical']}/{lossless['checked']}{more}"


def is_unfaithful(row: dict) -> bool:
    """Whether an answer differs from vanilla's without a tie, or the law's test says so (1%)."""
    lossless = row["lossless"]
    if lossless["kind"] == "identical":
        return lossless["identical"] + lossless["ties"] < lossless["checked"]
    return lossless["kind"] == "lossy" or lossless["p_value"] < 0.01


def count(number: int) -> str:
    """A count in three digits or so: 950, 2.1M, 70.6B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # what rounds up to one of it
            scaled = number / size
            return f"{scaled:.0f}{letter}" if scaled >= 100 else f"{scaled:.3g}{letter}"
    return str(int(number))


def milliseconds(value: float) -> str:
    """Milliseconds in three digits or so, without the unit."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _interval(key: str) -> Callable[[dict], str]:
    def text(row: dict) -> str:
        low, high = row[key]
        return f"[{low:.2f}, {high:.2f}]" if row["method"] != "vanilla" else ""

    return text


def _rate(row: dict) -> str:
    rate = row["tokens_per_s"]
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


COLUMNS = {
    "method": Column("method", lambda row: row["method"], left=True),
    "task": Column("task", lambda row: row["task"], left=True),
    "temperature": Column("T", lambda row: f"{row['temperature']:g}"),
    "batch": Column("B", lambda row: str(row["batch"])),
    "seed": Column("seed", lambda row: str(row["seed"])),
    "tau": Column("tau", lambda row: f"{row['tau']:.2f}", _interval("tau_ci95")),
    "break_even": Column("break\neven", lambda row: f"{row['break_even_tau']:.2f}"),
    "acceptance": Column(
        "accepted %\nby depth",
        lambda row: " ".join(f"{100 * share:.0f}" for share in row["acceptance_by_depth"]) or "-",
        left=True,
    ),
    "rate": Column("tokens\nper s", _rate),
    "speedup": Column(
        "speedup",
        lambda row: f"{row['speedup']:.2f}x",
        _interval("speedup_ci95"),
        lambda row: row["speedup"] < 1,
    ),
    "draft": Column("draft\nms", lambda row: milliseconds(row["draft_ms"])),
    "verify": Column("verify\nms", lambda row: milliseconds(row["verify_ms"])),
    "round": Column("round\nms", lambda row: milliseconds(row["round_ms"])),
    "overhead": Column("overhead", lambda row: f"{100 * row['round_overhead']:+.0f}%"),
    "tree": Column("nodes,\ndepth", lambda row: f"{row['nodes']}, {row['depth']}"),
    "lossless": Column("lossless", verdict, bad=is_unfaithful),
    "flops": Column("draft\nflops", lambda row: count(row.get("draft_flops", 0))),
    "parameters": Column("drafter\nparams", lambda row: count(row["drafter_parameters"])),
    "trained": Column("trained\ntokens", lambda row: count(row["train_tokens"])),
}
"""Every column, by name, in reading order."""

KEYS = ("method", "task", "temperature", "batch", "seed")
DRAFTS = ("tau", "break_even", "acceptance")
RESULTS = ("rate", "speedup", "lossless")
COSTS = ("draft", "verify", "round", "overhead", "tree", "flops", "parameters", "trained")
FINDINGS = ("tau", "break_even", *RESULTS)
REASONS = ("acceptance", *COSTS)


def shown_columns(rows: Sequence[dict]) -> list[str]:
    """All columns, batch and seed only where they say something."""
    idle = set()
    if all(row["batch"] == 1 for row in rows):
        idle.add("batch")
    if len({row["seed"] for row in rows}) <= 1:
        idle.add("seed")
    return [name for name in COLUMNS if name not in idle]


def print_table(rows: Sequence[dict], file: IO[str] | None = None) -> None:
    """Print the rows, one line each, to `file` or standard output.

    The first layout that fits is taken: one table; two, what came out and why; three, with the
    setting as a heading instead of columns. Plain ASCII without colour unless it is a terminal.
    """
    console = make_console(file)
    for tables in _layouts(rows):
        if max(natural_width(table, console) for table in tables) <= console.width:
            break
    for index, table in enumerate(tables):
        if index:
            console.print()
        console.print(table)


def one_line(column: Column, row: dict) -> str:
    """The cell with its detail beside it."""
    return f"{column.text(row)} {column.detail(row)}".strip()


# Only the line under the heading is drawn, in ASCII: it survives pipes, logs and issue trackers.
_RULE = Box("    \n    \n -  \n    \n    \n    \n    \n    \n", ascii=True)


def _layouts(rows: Sequence[dict]) -> list[list[Table]]:
    shown = shown_columns(rows)
    keys = [name for name in KEYS if name in shown]
    named = [name for name in ("method", "seed") if name in shown]
    return [
        [_table(rows, shown)],
        [_table(rows, [*keys, *names]) for names in (FINDINGS, REASONS)],
        [_grouped_table(rows, [*named, *names]) for names in (DRAFTS, RESULTS, COSTS)],
    ]


def _table(rows: Sequence[dict], names: Sequence[str]) -> Table:
    table = Table(box=_RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        justify = "left" if COLUMNS[name].left else "right"
        table.add_column(COLUMNS[name].heading, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(COLUMNS[name], row) for name in names))
    return table


def _grouped_table(rows: Sequence[dict], names: Sequence[str]) -> Table:
    table = _table([], names)
    for name in dict.fromkeys(map(setting, rows)):
        table.add_row(Text(name, style="bold"))
        for row in rows:
            if setting(row) == name:
                table.add_row(*(_cell(COLUMNS[column], row) for column in names))
    return table


def _cell(column: Column, row: dict) -> Text:
    return Text(one_line(column, row), style="red" if column.bad(row) else "")
