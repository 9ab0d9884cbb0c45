"""The report's figures, as SVG text that a page can hold inline.

Text and axes are drawn in the page's own text colour (currentColor) on no background, and methods
in mid-tones, so one figure serves a light and a dark page. Text stays text: it can be selected,
searched and read aloud. matplotlib is imported only when something is drawn.
"""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from specjax.evaluation.records import VANILLA
from specjax.evaluation.tables import setting

INK = "#010203"
"""Stands for the page's text colour while drawing; no figure uses it for anything else."""

GREY = "#8b919b"
PALETTE = ("#d9772b", "#4a8fdc", "#2f9e6e", "#b56ccb", "#c9526f", "#8f9430", "#2b9db0", "#a97c50")
"""Told apart in greyscale and by common colour blindness, and clear of black and of white."""

MARKERS = "osD^vPX*"
WIDTH = 5.0  # inches; a page shows a figure at its own width or narrower

Curve = tuple[Sequence[float], Sequence[float]]


def method_colours(rows: Sequence[dict]) -> dict[str, str]:
    """A colour per method in order of appearance, the same in every figure; vanilla is grey."""
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] != VANILLA)
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(methods)}
    return colours | {VANILLA: GREY}


def draw_tau(rows: Sequence[dict]) -> str:
    """tau with its interval, a line per setting, a colour per method, its break-even a bar."""

    def finish(axes):
        axes.plot([], [], "|", color=INK, markersize=13, label="break-even tau")
        axes.set_xlim(left=min(0.9, axes.get_xlim()[0]))
        axes.set_xlabel("tau, tokens per round")

    return _by_setting(rows, "tau", "break_even_tau", finish, "tau by method and setting")


def draw_speedups(rows: Sequence[dict]) -> str:
    """Speedup with its interval, a line per setting, a colour per method."""

    def finish(axes):
        axes.axvline(1, color=INK, linewidth=1, linestyle="--", alpha=0.6, label="vanilla's speed")
        axes.set_xlabel("speedup over vanilla")

    return _by_setting(rows, "speedup", None, finish, "speedup by method and setting")


def _by_setting(rows, value: str, threshold: str | None, finish: Callable, label: str) -> str:
    """A value with its interval, a group of lines per setting; `threshold` is marked by a bar."""
    rows = _drafted(rows)
    settings, methods = _unique(map(setting, rows)), _unique(row["method"] for row in rows)

    def paint(axes):
        for row in rows:
            lane = (methods.index(row["method"]) + 0.5) / len(methods) - 0.5
            y = settings.index(setting(row)) + 0.7 * lane
            style = {"color": row["colour"], "linewidth": 2}
            axes.plot(row[f"{value}_ci95"], [y, y], **style)
            axes.plot(row[value], y, row["marker"], label=row["label"], **style)
            if threshold:
                axes.plot(row[threshold], y, "|", markersize=13, **style)
        axes.set_yticks(range(len(settings)), map(_short, settings))
        axes.set_ylim(len(settings) - 0.5, -0.5)
        finish(axes)
        _grid(axes, "x")

    lines = len(settings) * max(len(methods), 2)
    return svg_of(paint, 1.3 + 0.22 * lines, label)


def draw_cost(rows: Sequence[dict]) -> str:
    """tau over what a draft costs, in steps of plain decoding: the upper left is where to be."""
    vanilla = {setting(row): row["round_ms"] for row in rows if row["method"] == VANILLA}
    rows = [row for row in _drafted(rows) if vanilla.get(setting(row))]

    def paint(axes):
        for row in rows:
            cost = row["draft_ms"] / vanilla[setting(row)]
            axes.plot([cost, cost], row["tau_ci95"], color=row["colour"], linewidth=2, alpha=0.6)
            axes.plot(cost, row["tau"], row["marker"], color=row["colour"], label=row["label"])
        axes.set_xlim(left=0)
        axes.set_xlabel("draft, in steps of plain decoding")
        axes.set_ylabel("tau, tokens per round")
        _grid(axes, "both")

    return svg_of(paint, 3.8, "tau over draft cost")


def draw_acceptance(rows: Sequence[dict], name: str) -> str:
    """Acceptance by depth for the rows of the setting called `name`, a line per method."""
    rows = _drafted(rows, only=name)

    def paint(axes):
        longest = 1
        for row in rows:
            shares = 100 * np.array(row["acceptance_by_depth"])
            longest = max(longest, len(shares))
            style = {"color": row["colour"], "label": row["label"]}
            axes.plot(range(1, len(shares) + 1), shares, row["marker"] + "-", **style)
        axes.set_ylim(0, 103)
        axes.set_xlim(0.7, longest + 0.3)
        axes.set_xticks(range(1, longest + 1))
        axes.set_xlabel("draft depth")
        axes.set_ylabel("accepted, %")
        _grid(axes, "y")

    return svg_of(paint, 3.4, f"acceptance by depth, {name}")


def draw_speedup(rows: Sequence[dict]) -> str:
    """Speedup over tau; a thin line leads from each method's break-even point to where it got."""
    rows = _drafted(rows)

    def paint(axes):
        axes.axhline(1, color=INK, linewidth=1, linestyle="--", alpha=0.6)
        for row in rows:
            tau, speedup, start = row["tau"], row["speedup"], row["break_even_tau"]
            colour, marker = row["colour"], row["marker"]
            bars = {"color": colour, "linewidth": 2, "alpha": 0.6}
            axes.plot([start, tau], [1, speedup], color=colour, linewidth=0.8)
            axes.plot(start, 1, marker, color=colour, fillstyle="none")
            axes.plot(row["tau_ci95"], [speedup, speedup], **bars)
            axes.plot([tau, tau], row["speedup_ci95"], **bars)
            axes.plot(tau, speedup, marker, color=colour, label=row["label"])
        axes.plot([], [], "o", color=INK, fillstyle="none", label="break-even tau")
        axes.plot([], [], "--", color=INK, linewidth=1, label="vanilla's speed")
        axes.set_xlabel("tau, tokens per round")
        axes.set_ylabel("speedup over vanilla")
        _grid(axes, "both")

    return svg_of(paint, 3.8, "speedup over tau")


def draw_rounds(rows: Sequence[dict]) -> str:
    """Where a round's milliseconds go; a bar per method and temperature, the mean over tasks."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        batch = f" B={row['batch']}" if row["batch"] != 1 else ""
        groups.setdefault(f"{row['method']} T={row['temperature']:g}{batch}", []).append(row)
    parts = {name: _round_parts(group) for name, group in groups.items()}

    def paint(axes):
        left = np.zeros(len(parts))
        shades = {"draft": PALETTE[0], "verify": PALETTE[1], "other": GREY}
        for index, (segment, colour) in enumerate(shades.items()):
            widths = np.array([part[index] for part in parts.values()])
            axes.barh(range(len(parts)), widths, 0.6, left, color=colour, label=segment)
            left += widths
        for y, (end, (*_, whole)) in enumerate(zip(left, parts.values(), strict=True)):
            offset = {"xytext": (4, 0), "textcoords": "offset points"}
            axes.annotate(f"{whole:.2f}", (end, y), va="center", **offset)
        axes.set_yticks(range(len(parts)), map(_short, parts))
        axes.set_ylim(len(parts) - 0.5, -0.5)
        axes.set_xlim(0, 1.15 * max(left))
        axes.set_xlabel("milliseconds per round")
        _grid(axes, "x")

    return svg_of(paint, 1.3 + 0.34 * len(parts), "where a round's time goes")


def draw_differences(summary: Sequence[dict]) -> str:
    """tau less the plain objective's with its interval over seeds, a line per objective.

    `summary` holds {"method", "difference", "ci95"}; the first entry is the plain one.
    """
    others = sorted(summary[1:], key=lambda entry: entry["difference"])

    def paint(axes):
        axes.axvline(0, color=INK, linewidth=1, linestyle="--", alpha=0.6)
        for y, entry in enumerate(others):
            clear = entry["ci95"][0] > 0 or entry["ci95"][1] < 0
            colour = PALETTE[1] if clear else GREY
            axes.plot(entry["ci95"], [y, y], color=colour, linewidth=2)
            axes.plot(entry["difference"], y, "o", color=colour)
        axes.set_yticks(range(len(others)), [_short(e["method"]) for e in others])
        axes.set_ylim(-0.5, len(others) - 0.5)
        axes.set_xlabel("tau less plain's, tokens per round")
        _grid(axes, "x")

    return svg_of(paint, 1.0 + 0.3 * len(others), "tau of each objective less the plain one's")


def standalone(svg: str) -> str:
    """A drawn <svg> element as a file of its own, legible on light and dark ground."""
    svg = svg.replace("xlink:href", "href")
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" color="#6e7781" ', 1)


def draw_curves(curves: Mapping[str, Curve], y_label: str, colours: Mapping[str, str]) -> str:
    """One line per training stage over its steps; `curves` maps a stage to (steps, values)."""

    def paint(axes):
        for index, (stage, (steps, values)) in enumerate(curves.items()):
            colour = colours.get(stage.removeprefix("train/"), PALETTE[-1 - index % 5])
            few = "." if len(steps) <= 30 else ""
            axes.plot(steps, values, few + "-", color=colour, label=_short(stage))
        axes.set_xlabel("training step")
        axes.set_ylabel(y_label)
        _grid(axes, "y")

    return svg_of(paint, 3.2, f"{y_label} by training step")


def thin_out(steps: Sequence[float], values: Sequence[float], points: int = 300) -> Curve:
    """At most `points` points, each the mean of its share of neighbours: a page stays small."""
    if len(steps) <= points:
        return steps, values
    means = [[part.mean() for part in np.array_split(line, points)] for line in (steps, values)]
    return means[0], means[1]


def svg_of(paint: Callable, height: float, label: str, width: float = WIDTH) -> str:
    """Draw with `paint(axes)` and return an <svg> element fit for the inside of a page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    settings = ink | {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.size": 10.5,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.markersize": 6,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = FigureCanvasSVG(figure).figure.subplots()
        paint(axes)
        _legend(figure, axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """Make a whole SVG file a part of a page.

    Prolog, metadata and namespaces go: HTML needs none, and they name addresses, of which a page
    that asks nothing of the network should be free. Ids get a prefix, for ids are the whole page's.
    """
    prefix = re.sub(r"\W+", "-", label) + "-"
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r'href="#', f'href="#{prefix}', body)
    body = re.sub(r"url\(#", f"url(#{prefix}", body)
    body = body.replace(INK, "currentColor")
    head, rest = body.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)[0]
    return f'<svg {view} role="img" aria-label="{html.escape(label)}">{rest.strip()}'


def _legend(figure, axes) -> None:
    """Names above the axes, in as many columns as do not push the axes aside."""
    names = axes.get_legend_handles_labels()[1]
    if names:
        columns = 3 if max(map(len, names)) <= 14 else 2
        spacing = {"handletextpad": 0.4, "columnspacing": 1.2, "borderaxespad": 0.2}
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, **spacing)


def _grid(axes, which: str) -> None:
    axes.grid(axis=which, color=INK, alpha=0.13, linewidth=0.8)
    axes.set_axisbelow(True)


def _round_parts(rows: Sequence[dict]) -> tuple[float, float, float, float]:
    """Mean draft, verify, other and whole milliseconds. Draft and verify are timed apart from the
    round, so they may exceed it by noise: the rest is then nothing."""
    draft, verify, whole = (
        float(np.mean([row[key] for row in rows])) for key in ("draft_ms", "verify_ms", "round_ms")
    )
    return draft, verify, max(0.0, whole - draft - verify), whole


def _drafted(rows: Sequence[dict], only: str | None = None) -> list[dict]:
    """The rows that draft (of one setting), each with its method's colour and marker, and with a
    label where the method appears first: a legend should name it once."""
    colours, named, drafted = method_colours(rows), set(), []
    order = list(colours)
    for row in rows:
        method = row["method"]
        if method == VANILLA or only not in (None, setting(row)):
            continue
        place = order.index(method)  # where colours start over, markers are one further on
        marker = MARKERS[(place + place // len(PALETTE)) % len(MARKERS)]
        label = None if method in named else _short(method)
        drafted.append(row | {"colour": colours[method], "marker": marker, "label": label})
        named.add(method)
    return drafted


def _unique(names) -> list[str]:
    return list(dict.fromkeys(names))


def _short(name: str, longest: int = 26) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"
