"""The report's figures: what each shows, as SVG text (inline_svg.py).

A method has one colour and one marker in every figure, and its name stands beside its marks, so
that no figure depends on telling colours apart. There is one row a method and setting:
`findings.over_seeds` sees to that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specjax.evaluation.inline_svg import INK, draw, grid, name_ends
from specjax.evaluation.records import VANILLA
from specjax.evaluation.tables import setting

GREY = "#8b919b"
PALETTE = (
    "#4c92d8", "#4c9214", "#d85a92", "#924cae", "#22765a", "#4c68e6",
    "#bc8468", "#bc3e5a", "#e65a14", "#229292", "#7676bc", "#a05a22",
)  # fmt: skip
"""Chosen by search: of colours with a contrast of at least 3:1 to black and white paper alike,
those that stay furthest apart under full red or green blindness (Machado et al. 2009)."""

MARKERS = "osD^vPX<"
ROW = 0.19  # inches that a line of a figure takes
FEW = 30  # rounds below which a share is drawn hollow

Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Look:
    """How a method is drawn, wherever it is drawn. Its name is short of what all names share."""

    colour: str
    marker: str
    name: str


def looks_of(rows: Sequence[dict]) -> dict[str, Look]:
    """The look of every method, in order of appearance; vanilla is grey.

    Where colours start over, markers are one further on.
    """
    methods = unique(row["method"] for row in rows if row["method"] != VANILLA)
    family = methods[0].rpartition("/")[0] + "/" if methods else ""
    shared = family if all(name.startswith(family) for name in methods) else ""
    looks = {
        name: Look(
            PALETTE[i % len(PALETTE)],
            MARKERS[(i + i // len(PALETTE)) % len(MARKERS)],
            short(name.removeprefix(shared)),
        )
        for i, name in enumerate(methods)
    }
    return looks | {VANILLA: Look(GREY, "|", VANILLA)}


def draw_tau(rows: Sequence[dict]) -> str:
    """tau with its interval, a panel per setting; a bar marks where each method breaks even."""

    def finish(panels):
        panels[0].plot([], [], "|", color=INK, markersize=10, label="breaks even")
        panels[0].legend(**_ABOVE)
        panels[-1].set_xlim(left=min(0.95, panels[-1].get_xlim()[0]))
        panels[-1].set_xlabel("tau, tokens per round")

    return _forest(rows, "tau", "break_even_tau", finish)


def draw_speedups(rows: Sequence[dict]) -> str:
    """Speedup with its interval, a panel per setting."""

    def finish(panels):
        for axes in panels:
            axes.axvline(1, color=INK, linewidth=0.9, linestyle="--", alpha=0.6, zorder=0)
        panels[0].plot([], [], "--", color=INK, linewidth=0.9, label="vanilla's speed")
        panels[0].legend(**_ABOVE)
        panels[-1].set_xlabel("speedup over vanilla")

    return _forest(rows, "speedup", None, finish)


_ABOVE = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False, "borderaxespad": 0.1,
          "handletextpad": 0.3}  # fmt: skip
"""A legend on the line of a panel's title."""


def _forest(rows, value: str, threshold: str | None, finish: Callable) -> str:
    """A value with its interval: a panel per setting, a line per method."""
    looks, methods = looks_of(rows), ranked(rows)
    settings = group(_drafted(rows), setting)

    def paint(panels):
        for axes, (name, members) in zip(panels, settings.items(), strict=True):
            for row in members:
                look, y = looks[row["method"]], methods.index(row["method"])
                axes.plot(row[f"{value}_ci95"], [y, y], color=look.colour, alpha=0.75)
                axes.plot(row[value], y, look.marker, color=look.colour, fillstyle=_fill(row))
                if threshold:
                    axes.plot(row[threshold], y, "|", color=INK, markersize=8, alpha=0.6)
            _lines(axes, [_named(looks[method], method, members) for method in methods])
            axes.set_title(short(name, 40))
            grid(axes, "x")
        finish(panels)

    height = 0.45 + len(settings) * (0.3 + ROW * len(methods))
    about = "; ".join(f"{_where(row)} {row[value]:.2f}" for row in _drafted(rows))
    return draw(paint, height, f"{value} by method", about, nrows=len(settings), sharex=True)


def load(row: dict) -> str:
    """What a round's time depends on beside the method: "T=0", and the batch where it is not 1."""
    return setting(row | {"task": ""}).strip()


def draw_rounds(rows: Sequence[dict], name: str) -> str:
    """Where a round's milliseconds go under the load called `name`: a bar per method, means over
    tasks and seeds. The draft has the method's own colour. All loads share one scale."""
    looks, methods = looks_of(rows), [VANILLA, *ranked(rows)]
    longest = max(max(row["round_ms"], row["draft_ms"] + row["verify_ms"]) for row in rows)
    members = group([row for row in rows if load(row) == name], lambda row: row["method"])
    parts = {method: round_parts(members[method]) for method in methods if method in members}

    def paint(axes):
        verifying, resting = {"color": INK, "alpha": 0.4}, {"color": INK, "alpha": 0.16}
        for y, (method, (draft, verify, rest, whole)) in enumerate(parts.items()):
            axes.barh(y, draft, 0.64, color=looks[method].colour, linewidth=0)
            axes.barh(y, verify, 0.64, draft, **verifying, linewidth=0)
            axes.barh(y, rest, 0.64, draft + verify, **resting, linewidth=0)
            end = max(whole, draft + verify), y
            axes.annotate(f"{whole:.2f}", end, (4, 0), textcoords="offset points", va="center")
        colour = looks[next(iter(ranked(rows)), VANILLA)].colour
        for part, style in (("draft, coloured", {"color": colour}), ("verify", verifying),
                            ("rest", resting)):  # fmt: skip
            axes.barh(0, 0, 0, label=part, linewidth=0, **style)
        axes.legend(**_ABOVE | {"loc": "lower left", "bbox_to_anchor": (0, 1)}, ncols=3,
                    handlelength=1, columnspacing=1.2)  # fmt: skip
        _lines(axes, [_named(looks[method], method, members[method]) for method in parts])
        axes.set_xlim(0, 1.12 * longest)
        axes.set_xlabel("milliseconds per round")

    about = "; ".join(f"{method} {part[-1]:.2f} ms" for method, part in parts.items())
    return draw(paint, 0.75 + ROW * len(parts), f"a round's time, {name}", about)


def draw_cost(rows: Sequence[dict], name: str) -> str:
    """tau over what a draft costs, in steps of plain decoding, for the setting called `name`.

    The upper left is where to be. What a method must exceed to pay depends on its whole round, not
    on its draft, and stands in `draw_tau`.
    """
    steps = {setting(row): row["round_ms"] for row in rows if row["method"] == VANILLA}
    looks, height = looks_of(rows), 2.9
    own = [row for row in _drafted(rows, name) if steps.get(setting(row))]
    costs = [row["draft_ms"] / steps[setting(row)] for row in own]

    def paint(axes):
        ends = []
        for row, cost in zip(own, costs, strict=True):
            look = looks[row["method"]]
            axes.plot([cost, cost], row["tau_ci95"], color=look.colour, alpha=0.5, linewidth=1.2)
            axes.plot(cost, row["tau"], look.marker, color=look.colour, fillstyle=_fill(row))
            ends.append((cost, row["tau"], _named(look, row["method"], own), look.colour))
        axes.set_xlim(0, 1.08 * max(costs, default=1.0) or 1.0)
        axes.set_ylim(bottom=min(1.0, axes.get_ylim()[0]))
        axes.set_xlabel("draft, in steps of plain decoding")
        axes.set_ylabel("tau, tokens per round")
        grid(axes, "both")
        name_ends(axes, ends, height - 0.5)

    about = "; ".join(
        f"{_where(row)} tau {row['tau']:.2f} at {cost:.2f} steps"
        for row, cost in zip(own, costs, strict=True)
    )
    return draw(paint, height, f"tau over draft cost, {name}", about)


def draw_acceptance(rows: Sequence[dict], name: str) -> str:
    """Acceptance by depth in the setting called `name`: a small panel per method, the others' lines
    faint behind its own. Shares of fewer than `FEW` rounds are hollow."""
    looks, order = looks_of(rows), ranked(rows)
    own = [row for row in _drafted(rows, name) if row["acceptance_by_depth"]]
    own = sorted(own, key=lambda row: order.index(row["method"]))
    longest = max(len(row["acceptance_by_depth"]) for row in own)
    columns = min(4, len(own))
    deep, high = [], []  # every line as one path, with a break after each
    for row in own:
        shares = row["acceptance_by_depth"]
        deep += [*range(1, len(shares) + 1), np.nan]
        high += [*(100 * share for share in shares), np.nan]

    def paint(panels):
        for axes, row in zip(panels, own, strict=False):
            look = looks[row["method"]]
            shares = 100 * np.array(row["acceptance_by_depth"])
            depths, many = np.arange(1, len(shares) + 1), trials_by_depth(row) >= FEW
            style = {"color": look.colour, "linestyle": "", "marker": look.marker}
            few = {"fillstyle": "none", "markersize": 6, "markeredgewidth": 0.8}
            axes.plot(deep, high, color=INK, linewidth=0.7, alpha=0.18)
            axes.plot(depths, shares, color=look.colour)
            axes.plot(depths[many], shares[many], **style, markersize=4)
            axes.plot(depths[~many], shares[~many], **style, **few)
            title = short(_named(look, row["method"], own), 17)
            axes.set_title(title, fontsize=8.2, fontweight="normal", pad=3)
            axes.set_ylim(0, 104)
            axes.set_yticks([0, 50, 100])
            axes.set_xlim(0.6, longest + 0.4)
            axes.set_xticks(range(1, longest + 1, -(-longest // 8)))
            lowest = axes in panels[len(own) - columns : len(own)]
            axes.tick_params(labelsize=8, length=2, labelbottom=lowest)
            grid(axes, "y")
        for axes in panels[len(own) :]:
            axes.set_axis_off()
        panels[0].figure.supxlabel("draft depth", fontsize=9)
        panels[0].figure.supylabel("accepted, %", fontsize=9)

    lines = -(-len(own) // columns)
    about = "; ".join(
        f"{row['method']} {' '.join(f'{100 * s:.0f}' for s in row['acceptance_by_depth'])}"
        for row in own
    )
    panels = {"nrows": lines, "ncols": columns, "sharey": True, "sharex": True}
    return draw(paint, 0.4 + 0.95 * lines, f"acceptance by depth, {name}", about, **panels)


def draw_curves(
    curves: Mapping[str, Curve], y_label: str, looks: Mapping[str, Look], height: float = 2.9
) -> str:
    """One line per training stage over its steps; `curves` maps a stage to (steps, values)."""

    def paint(axes):
        ends = []
        for stage, (steps, values) in curves.items():
            method = stage.removeprefix("train/")
            look = looks.get(method, Look(GREY, ".", short(method)))
            few = {"marker": look.marker, "markersize": 3} if len(steps) <= 12 else {}
            axes.plot(steps, values, color=look.colour, linewidth=1.3, **few)
            ends.append((steps[-1], values[-1], look.name, look.colour))
        axes.set_xlabel("training step")
        axes.locator_params("x", integer=True)
        axes.set_ylabel(y_label)
        grid(axes, "y")
        axes.set_ylim(axes.get_ylim())
        name_ends(axes, ends, height - 0.5)

    about = "; ".join(f"{stage} ends at {line[1][-1]:.3g}" for stage, line in curves.items())
    return draw(paint, height, f"{y_label} by training step", about)


def draw_differences(summary: Sequence[dict]) -> str:
    """tau less the plain objective's with its interval over seeds, a line per objective.

    `summary` holds {"method", "difference", "ci95"}; the first entry is the plain one.
    """
    others = sorted(summary[1:], key=lambda entry: -entry["difference"])

    def paint(axes):
        axes.axvline(0, color=INK, linewidth=1, linestyle="--", alpha=0.6)
        for y, entry in enumerate(others):
            clear = entry["ci95"][0] > 0 or entry["ci95"][1] < 0
            colour = PALETTE[0] if clear else GREY
            axes.plot(entry["ci95"], [y, y], color=colour)
            axes.plot(entry["difference"], y, "o", color=colour)
        _lines(axes, [short(entry["method"]) for entry in others])
        axes.set_xlabel("tau less plain's, tokens per round")
        grid(axes, "x")

    about = "; ".join(f"{entry['method']} {entry['difference']:+.3f}" for entry in others)
    label = "tau of each objective less the plain one's"
    return draw(paint, 0.6 + 0.26 * len(others), label, about)


def thin_out(steps: Sequence[float], values: Sequence[float], points: int = 200) -> Curve:
    """At most `points` points, each the mean of its share of neighbours: a page stays small."""
    if len(steps) <= points:
        return steps, values
    means = [[part.mean() for part in np.array_split(line, points)] for line in (steps, values)]
    return means[0], means[1]


def round_parts(rows: Sequence[dict]) -> tuple[float, float, float, float]:
    """Mean draft, verify, other and whole milliseconds. Draft and verify are timed apart from the
    round, so they may exceed it by noise: the rest is then nothing."""
    draft, verify, whole = (
        float(np.mean([row[key] for row in rows])) for key in ("draft_ms", "verify_ms", "round_ms")
    )
    return draft, verify, max(0.0, whole - draft - verify), whole


def trials_by_depth(row: dict) -> np.ndarray:
    """How many rounds, about, each share of `acceptance_by_depth` rests on."""
    shares = [1.0, *row["acceptance_by_depth"][:-1]]
    return row["rounds"] * np.cumprod(shares)


def ranked(rows: Sequence[dict]) -> list[str]:
    """The methods that draft, fastest first (mean speedup): the order of lines in every figure."""
    speeds = {name: [r["speedup"] for r in own] for name, own in
              group(_drafted(rows), lambda row: row["method"]).items()}  # fmt: skip
    return sorted(speeds, key=lambda name: -np.mean(speeds[name]))


def group(rows: Sequence[dict], name_of: Callable[[dict], str]) -> dict[str, list[dict]]:
    """The rows by name, in order of appearance."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(name_of(row), []).append(row)
    return groups


def unique(names) -> list[str]:
    """The names in order of appearance."""
    return list(dict.fromkeys(names))


def short(name: str, longest: int = 26) -> str:
    """The name, its middle left out where it is too long."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[head + 1 - longest :]}"


def _drafted(rows: Sequence[dict], only: str | None = None) -> list[dict]:
    """The rows that draft (of one setting)."""
    return [r for r in rows if r["method"] != VANILLA and only in (None, setting(r))]


def _named(look: Look, method: str, rows: Sequence[dict]) -> str:
    """The method's name, with a word of warning where its rule is lossy."""
    lossy = any(row["method"] == method and not row["exact"] for row in rows)
    return look.name + (" (lossy)" if lossy else "")


def _fill(row: dict) -> str:
    return "full" if row["exact"] else "none"


def _where(row: dict) -> str:
    return f"{row['method']}, {setting(row)}:"


def _lines(axes, names: Sequence[str]) -> None:
    """One line a name, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
