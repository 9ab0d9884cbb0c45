"""Figures: names that never touch, colours that everyone tells apart, nothing left out."""

import re

import numpy as np
import pytest
from scipy.optimize import minimize

from specjax.evaluation import figures, page
from specjax.evaluation.inline_svg import FONT, spread

PROTAN = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
          [-0.003882, -0.048116, 1.051998]]  # fmt: skip
DEUTAN = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
          [-0.011820, 0.042940, 0.968881]]  # fmt: skip
"""Machado et al. 2009, severity 1, on linear RGB."""


def linear(colour: str) -> np.ndarray:
    if len(colour) == 4:
        colour = "#" + "".join(2 * digit for digit in colour[1:])
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb) -> np.ndarray:
    """CIE L*a*b*, D65: a unit is about what an eye just sees."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(xyz @ rgb, 1e-6, None) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    bright = sorted(linear(c) @ [0.2126, 0.7152, 0.0722] + 0.05 for c in (one, other))
    return bright[1] / bright[0]


def test_colours_are_seen_on_both_papers():
    papers = re.findall(r"--paper: (#[0-9a-f]+)", page.STYLE)
    assert len(papers) == 2
    for colour in (*figures.PALETTE, figures.GREY):
        assert min(contrast(colour, paper) for paper in papers) >= 3, colour


@pytest.mark.parametrize("sight", [np.eye(3), PROTAN, DEUTAN], ids=["full", "protan", "deutan"])
def test_colours_are_told_apart(sight):
    seen = np.array([lab(np.clip(np.array(sight) @ linear(c), 0, 1)) for c in figures.PALETTE])
    gaps = np.linalg.norm(seen[:, None] - seen, axis=-1) + 1e3 * np.eye(len(seen))
    assert gaps.min() > 5


def test_many_methods_look_different(make_rows):
    one = make_rows()[1]
    looks = figures.looks_of([one | {"method": f"m{i}"} for i in range(40)])
    assert len({(look.colour, look.marker) for look in looks.values()}) == 41


@pytest.mark.parametrize(
    "methods, names",
    [
        (["f/a", "f/b"], ["a", "b"]),
        (["f/a", "g/a"], ["f/a", "g/a"]),
        (["f", "f/best"], ["f", "f/best"]),
        (["x/y/a", "x/y/b"], ["a", "b"]),
    ],
)
def test_names_lose_what_all_share(make_rows, methods, names):
    looks = figures.looks_of(make_rows(methods=methods))
    assert [looks[method].name for method in methods] == names


@pytest.mark.parametrize("seed", range(5))
def test_names_are_as_near_as_they_can_be(seed):
    """Against a general solver: least squares under a gap, inside [0, 1]."""
    generator = np.random.default_rng(seed)
    wanted, gap = np.sort(generator.uniform(-0.1, 1.1, 7)), 0.09
    wanted[2] = wanted[3]
    places = spread(wanted, gap)
    assert np.diff(places).min() >= gap - 1e-9 and 0 <= places[0] and places[-1] <= 1 + 1e-9
    slow = minimize(
        lambda x: ((x - wanted) ** 2).sum(), np.linspace(0, 1, 7), bounds=[(0, 1)] * 7,
        constraints={"type": "ineq", "fun": lambda x: np.diff(x) - gap}, options={"ftol": 1e-12},
    )  # fmt: skip
    np.testing.assert_allclose(places, slow.x, atol=1e-4)


def test_names_that_do_not_fit_divide_the_room():
    np.testing.assert_allclose(spread(np.full(5, 0.5), 0.4), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(spread(np.array([0.3]), 0.4), [0.3])


def text_places(svg: str, names) -> np.ndarray:
    """Heights at which the names are written, in points."""
    found = {name: y for y, name in re.findall(r'<text [^>]* y="([^"]*)"[^>]*>([^<]*)', svg)}
    return np.array([float(found[name]) for name in names])


def test_ten_names_at_one_point_do_not_touch(make_rows):
    names = [f"method_{i}" for i in range(10)]
    rows = make_rows(methods=names)
    rows = [row | ({"tau": 2.0, "draft_ms": 1.0} if row["method"] in names else {}) for row in rows]
    curves = {name: ([1, 2], [3.0, 2.0]) for name in names}
    looks = figures.looks_of(rows)
    for svg in (figures.draw_cost(rows, "builtin T=0"), figures.draw_curves(curves, "loss", looks)):
        assert np.diff(np.sort(text_places(svg, names))).min() >= FONT


def test_a_panel_a_setting_and_a_line_a_method(make_rows):
    rows = make_rows(("a", "b"), (0.0, 1.0), ("x", "y"))
    for svg in (figures.draw_tau(rows), figures.draw_speedups(rows)):
        words = re.findall(r"<text [^>]*>([^<]*)</text>", svg)
        assert [w for w in words if "T=" in w] == ["a T=0", "a T=1", "b T=0", "b T=1"]
        assert words.count("x") == words.count("y") == 4


def test_methods_stand_fastest_first_everywhere(make_rows):
    rows = make_rows(methods=("slow", "fast"))
    rows = [r | {"speedup": {"slow": 0.5, "fast": 2.0}.get(r["method"], 1.0)} for r in rows]
    for svg in (figures.draw_tau(rows), figures.draw_rounds(rows, "T=0"),
                figures.draw_acceptance(rows, "builtin T=0")):  # fmt: skip
        assert svg.index(">fast<") < svg.index(">slow<")


def test_thinning_keeps_the_mean_and_the_order():
    steps, values = list(range(1200)), [float(step % 7) for step in range(1200)]
    thin_steps, thin_values = figures.thin_out(steps, values)
    assert len(thin_steps) == 200 and sorted(thin_steps) == list(thin_steps)
    assert sum(thin_values) / 200 == pytest.approx(sum(values) / 1200)
    assert figures.thin_out(steps[:10], values[:10]) == (steps[:10], values[:10])


def test_round_parts_never_go_below_nothing():
    noisy = {"draft_ms": 2.0, "verify_ms": 4.0, "round_ms": 5.0}
    assert figures.round_parts([noisy]) == (2.0, 4.0, 0.0, 5.0)


def test_trials_are_the_rounds_that_got_there():
    row = {"rounds": 80, "acceptance_by_depth": [0.5, 0.25, 1.0]}
    np.testing.assert_allclose(figures.trials_by_depth(row), [80, 40, 10])


@pytest.mark.parametrize("name", ["x" * 26, "x" * 27, "family/" + "long" * 20 + "/tail"])
def test_short_names_keep_both_ends(name):
    brief = figures.short(name)
    assert len(brief) <= 26 and name.startswith(brief[:12]) and name.endswith(brief[-12:])
    assert (brief == name) == (len(name) <= 26)
