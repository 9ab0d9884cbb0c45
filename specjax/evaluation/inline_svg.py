"""From a matplotlib drawing to SVG text that a page can hold inline.

Text and axes are drawn in the page's own text colour (currentColor) on no background, so one figure
serves a light and a dark page. Text stays text: it can be selected, searched and read aloud.
matplotlib is imported only when something is drawn.
"""

import html
import io
import re
from collections.abc import Callable, Sequence

import numpy as np

INK = "#010203"
"""Stands for the page's text colour while drawing; no figure uses it for anything else."""

WIDTH = 4.8  # inches; a page shows a figure at its own width or narrower
FONT = 9.5  # points, at that width


def draw(
    paint: Callable, height: float, label: str, about: str = "", width: float = WIDTH, **panels
) -> str:
    """Draw with `paint(axes)` and return an <svg> element fit for the inside of a page.

    height, width: inches
    label:  names the figure, and its ids: no two of a page may share it
    about:  what it shows, in words, for those who cannot see it
    panels: nrows, ncols, sharex, ... of `Figure.subplots`; `paint` gets a list of axes then
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    settings = ink | {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.size": FONT,
        "axes.titlesize": FONT,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "text.parse_math": False,
        "lines.markersize": 5.5,
        "lines.linewidth": 1.6,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = FigureCanvasSVG(figure).figure.subplots(**panels, squeeze=False)
        paint(list(axes.flat) if panels else axes[0, 0])
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), label, about)


def standalone(svg: str) -> str:
    """A drawn <svg> element as a file of its own, legible on light and dark ground."""
    own = 'xmlns="http://www.w3.org/2000/svg" color="#6e7781" font-family="sans-serif"'
    return svg.replace("xlink:href", "href").replace("<svg ", f"<svg {own} ", 1)


def _inline(svg: str, label: str, about: str) -> str:
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
    body = re.sub(r'font-family: [^;"]*;? ?| transform="rotate\(-0 [^"]*"', "", body)  # the page's
    body = body.replace(INK, "currentColor")
    head, rest = body.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)[0]
    words = html.escape(f"{label}. {about}" if about else label)
    return f'<svg {view} role="img" aria-label="{words}">{rest.strip()}'


def grid(axes, which: str) -> None:
    """Faint lines behind everything else."""
    axes.grid(axis=which, color=INK, alpha=0.13, linewidth=0.8)
    axes.set_axisbelow(True)


def name_ends(axes, ends: Sequence[tuple[float, float, str, str]], height: float) -> None:
    """Write names in a column right of the axes, each led to its (x, y, name, colour) by a line.

    Names stand as near to their points as they can without touching each other. `height` is that
    of the axes in inches, and the limits of y must be final.
    """
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[1])
    low, high = axes.get_ylim()
    wanted = np.array([(y - low) / (high - low) for _, y, *_ in ends])
    for (x, y, name, colour), at in zip(
        ends, spread(wanted, 1.15 * FONT / 72 / height), strict=True
    ):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.55}
        axes.annotate(
            name, (x, y), (1.06, at), textcoords="axes fraction", va="center", color=INK,
            arrowprops=line | {"relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3},
            annotation_clip=False,
        )  # fmt: skip


def spread(wanted_N: np.ndarray, gap: float) -> np.ndarray:
    """Ascending places in [0, 1] nearest to the wanted ones (least squares), `gap` apart.

    Where so many do not fit, they divide the room evenly.
    """
    from scipy.optimize import isotonic_regression

    count = len(wanted_N)
    gap = min(gap, 1 / max(count - 1, 1))
    steps_N = gap * np.arange(count)
    return np.clip(isotonic_regression(wanted_N - steps_N).x, 0, 1 - steps_N[-1]) + steps_N
