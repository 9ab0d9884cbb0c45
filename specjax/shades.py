"""One palette for text shaded by the draft depth that proposed it, in the report and a terminal.

Depth 0 is a token of the target's own and has no shade; deeper drafts are stronger.
"""

from rich.color import Color
from rich.style import Style

SHADES = 8
"""Draft depths with a shade of their own; deeper ones share the last."""

SHADE_RGB = (74, 143, 220)
_INK, _PAPER = (228, 231, 235), (21, 24, 29)  # of the report's dark theme


def shade(depth: int) -> int:
    """Which shade a depth has; 0 = none."""
    return max(0, min(int(depth), SHADES))


def opacity(depth: int) -> float:
    """How much of the colour lies on the paper."""
    return 0.1 + 0.065 * shade(depth)


def terminal_style(depth: int) -> Style:
    """The shade on dark paper, with its own ink: a terminal does not tell its background."""
    if not shade(depth):
        return Style.null()
    part = opacity(depth)
    mixed = (round(p + part * (c - p)) for c, p in zip(SHADE_RGB, _PAPER, strict=True))
    return Style(color=Color.from_rgb(*_INK), bgcolor=Color.from_rgb(*mixed))
