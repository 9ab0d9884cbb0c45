"""Pictures of one round and of an answer, and what shows them in a notebook.

As in the figures, text takes the page's own colour and fills are translucent, so that a picture
serves light and dark pages. Everything drawn is vector: no raster, no script.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from specjax.evaluation.figures import GREY
from specjax.evaluation.inline_svg import draw, standalone
from specjax.shades import SHADE_RGB, opacity, shade

_BLUE = tuple(part / 255 for part in SHADE_RGB)
_CELL = 0.3  # inches: the height of a row of cells
_LEVEL, _LANE = 1.1, 0.42  # inches from one depth of a tree to the next, and between its leaves
_FULL = 0.3  # the fill of a share of 1: mid-grey text on it stays legible on either ground
_WIDEST = 690.0  # points: what a notebook's page has room for
_VISIBLE = {" ": "·", "\n": "↵", "\t": "→"}


@dataclass(frozen=True)
class Picture:
    """An <svg> element that a notebook shows at its own size, or narrower."""

    svg: str

    def _repr_svg_(self) -> str:
        _, _, *size = map(float, re.search(r'viewBox="([^"]*)"', self.svg)[1].split())
        width, height = (min(1.0, _WIDEST / size[0]) * side for side in size)
        size = f'width="{width:.1f}pt" height="{height:.1f}pt" style="max-width:100%;height:auto"'
        return standalone(self.svg).replace("<svg ", f"<svg {size} ", 1)


@dataclass(frozen=True)
class Passage:
    """Text with its own shades, in HTML."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


# ---- text ----------------------------------------------------------------------------------------


def token_label(text: str, longest: int = 10) -> str:
    """A token's text on one line, white space made visible: "\\n        " is "↵·8"."""
    text = re.sub(r" {3,}|\n{3,}|\t{3,}", lambda run: f"{run[0][0]}{len(run[0])}", text)
    shown = "".join(_VISIBLE.get(c, c if c.isprintable() else "�") for c in text)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def shaded(pieces: Sequence[tuple[str, int]], prompt: str = "") -> Passage:
    """An answer's pieces (text, depth), each shaded by the draft depth that proposed it.

    Depth 0 is the target's own token and has no shade; `prompt` stands before them, in grey.
    """
    depths = range(1, max((shade(depth) for _, depth in pieces), default=0) + 1)
    legend = " ".join(_mark(f"&nbsp;depth {depth}&nbsp;", depth) for depth in depths)
    text = "".join(_mark(escape(text), depth) for text, depth in pieces)
    style = (
        "font-family:ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;"
        "line-height:1.6;margin:.5em 0"
    )
    return Passage(
        f"<div>plain: the target's own. Accepted drafts: {legend or 'none'}</div>"
        f'<pre style="{style}"><span style="opacity:.6">{escape(prompt)}</span>{text}</pre>'
    )


def _mark(html: str, depth: int) -> str:
    if not shade(depth):
        return html
    colour = f"rgba({', '.join(map(str, SHADE_RGB))}, {opacity(depth):.2f})"
    style = f"background:{colour};border-radius:2px"
    return f'<span style="{style}" title="draft depth {depth}">{html}</span>'


# ---- trees ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeView:
    """A draft tree as it is drawn; entry i of each list is row i.

    parents: -1 for the root, which comes first
    labels:  a token's text
    notes:   what stands below it, "" for nothing
    path:    rows that verification accepted, shaded by depth
    extra:   the target's own token after them, "" for none
    """

    title: str
    parents: Sequence[int]
    labels: Sequence[str]
    notes: Sequence[str] = ()
    path: Sequence[int] = ()
    extra: str = ""

    def __post_init__(self):
        count = len(self.parents)
        if len(self.labels) != count or len(self.notes) not in (0, count):
            raise ValueError(f"{self.title}: labels and notes must have {count} entries each")
        places(self.parents)
        if not all(0 < row < count for row in self.path):
            raise ValueError(f"path: {tuple(self.path)} must hold rows 1 to {count - 1}")


def places(parents: Sequence[int]) -> list[tuple[int, float]]:
    """(depth, lane) of each row: a first child continues its parent's lane, others open new ones.

    No two rows share a place, and lanes follow the order of a walk from the root.

    Raises:
      ValueError: a parent that does not come before its child.
    """
    children: list[list[int]] = [[] for _ in parents]
    for row, parent in enumerate(parents):
        if (parent != -1) if row == 0 else not 0 <= parent < row:
            raise ValueError(f"parents[{row}] = {parent} must be an earlier row, -1 for the root")
        if row:
            children[parent].append(row)
    found, lane, stack = [(0, 0)] * len(parents), -1, [(0, 0, True)]
    while stack:
        row, depth, opens = stack.pop()
        lane += opens
        found[row] = (depth, lane)
        below = [(child, depth + 1, rank > 0) for rank, child in enumerate(children[row])]
        stack += reversed(below)
    return found


def draw_trees(views: Sequence[TreeView]) -> str:
    """Trees side by side, the root of each on the left; accepted rows are shaded by depth."""
    spans = [_span(view) for view in views]
    lanes = max(lane for _, lane in spans)

    def paint(axes):
        left = 0.0
        for view, (depth, _) in zip(views, spans, strict=True):
            _paint_tree(axes, view, left)
            left += depth + 1.1
        axes.set_xlim(-0.5, left - 0.6)
        axes.set_ylim(lanes + 0.6, -1.0)
        axes.axis("off")

    width = _LEVEL * sum(depth + 1.1 for depth, _ in spans)
    label = "; ".join(v.title for v in views)
    return draw(paint, _LANE * (lanes + 1.6), label, width=width)


def _with_extra(view: TreeView) -> list[int]:
    last = view.path[-1] if len(view.path) else 0
    return [*view.parents, last] if view.extra else list(view.parents)


def _span(view: TreeView) -> tuple[int, int]:
    at = places(_with_extra(view))
    return max(depth for depth, _ in at), max(lane for _, lane in at)


def _paint_tree(axes, view: TreeView, left: float) -> None:
    parents = _with_extra(view)
    at = [(left + depth, lane) for depth, lane in places(parents)]
    labels, notes = [*view.labels, view.extra], [*(view.notes or [""] * len(view.parents)), ""]
    accepted = {0, *view.path}
    axes.text(left - 0.4, -0.85, view.title, fontweight="bold", va="center")
    for row, (x, y) in enumerate(at):
        own = row >= len(view.parents)
        taken = own or row in accepted
        if row:
            px, py = at[parents[row]]
            style = {"color": _BLUE if taken else GREY, "linewidth": 2.2 if taken else 0.9}
            # Boxes are translucent, so lines end at their edges.
            begin, end = px + _half_width(labels[parents[row]]), x - _half_width(labels[row])
            axes.plot([begin, x - 0.5, x - 0.5, end], [py, py, y, y], zorder=0, **style)
        strength = opacity(round(x - left)) if row and taken and not own else 0.0
        box = {
            "boxstyle": "round,pad=0.3",
            "edgecolor": _BLUE if taken else GREY,
            "facecolor": (*_BLUE, strength),
            "linestyle": "--" if own else "-",
        }
        axes.text(x, y, labels[row], ha="center", va="center", bbox=box, fontsize=9.5)
        axes.text(x, y + 0.47, notes[row], ha="center", va="center", fontsize=8)


def _half_width(label: str) -> float:
    """Of a label's box, in levels."""
    return (0.042 * len(label) + 0.07) / _LEVEL


# ---- cells ---------------------------------------------------------------------------------------


def draw_cells(
    texts: Sequence[Sequence[str]],
    shares: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    cell: float = 0.9,
    row_name: str = "",
    column_name: str = "",
) -> str:
    """A table of cells: a text each, on a fill as strong as its share in [0, 1].

    Args:
      texts, shares: row by row.
      rows, columns: headings.
      label: what the picture shows, in words.
      cell: width of a cell in inches; the headings of columns under half an inch stand upright.
      row_name, column_name: what the headings are of, "" for nothing.

    Raises:
      ValueError: rows of unequal length, or a share out of range.
    """
    size = len(rows), len(columns)
    for name, table in (("texts", texts), ("shares", shares)):
        if len(table) != size[0] or any(len(line) != size[1] for line in table):
            raise ValueError(f"{name}: {size[0]} rows of {size[1]} cells are expected")
    if not all(0 <= share <= 1 for line in shares for share in line):
        raise ValueError("shares: numbers from 0 to 1 are expected")
    upright = cell < 0.5

    def paint(axes):
        from matplotlib.patches import Rectangle

        for r, (line, fills) in enumerate(zip(texts, shares, strict=True)):
            for c, (text, share) in enumerate(zip(line, fills, strict=True)):
                fill = (*_BLUE, _FULL * float(share))
                axes.add_patch(
                    Rectangle((c, r), 1, 1, facecolor=fill, edgecolor=GREY, linewidth=0.4)
                )
                axes.text(c + 0.5, r + 0.52, text, ha="center", va="center", fontsize=9)
        axes.set_xlim(0, size[1])
        axes.set_ylim(size[0], 0)
        axes.set_yticks([r + 0.5 for r in range(size[0])], rows, fontsize=9)
        axes.set_xticks(
            [c + 0.5 for c in range(size[1])], columns, fontsize=9, rotation=90 * upright
        )
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel(column_name)
        axes.set_ylabel(row_name)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    margin = 0.09 * max(map(len, rows), default=0) + 0.2 + 0.2 * bool(row_name)
    top = 0.09 * max(map(len, columns), default=0) + 0.2 if upright else 0.35
    top += 0.2 * bool(column_name)
    return draw(paint, _CELL * size[0] + top, label, width=cell * size[1] + margin)
