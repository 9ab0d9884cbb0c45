"""Trees keep their shape when drawn, cells their shares, texts their characters."""

import itertools
import re
import xml.dom.minidom
from html.parser import HTMLParser

import numpy as np
import pytest

from specjax.evaluation.pictures import (
    Picture,
    TreeView,
    draw_cells,
    draw_trees,
    places,
    shaded,
    token_label,
)
from specjax.shades import opacity
from specjax.trees import backbone, branching, chain, paths


def words(svg: str) -> list[str]:
    """The texts of a picture, in order."""
    document = xml.dom.minidom.parseString(Picture(svg)._repr_svg_())
    nodes = document.getElementsByTagName("text")
    return ["".join(child.data for child in node.childNodes).strip() for node in nodes]


def every_tree(count: int):
    """The parents of every tree of `count` rows."""
    for parents in itertools.product(*(range(row) for row in range(1, count))):
        yield (-1, *parents)


def test_places_are_depths_and_lanes_of_every_small_tree():
    for parents in itertools.chain(*map(every_tree, range(1, 7))):
        at = places(parents)
        assert len(set(at)) == len(at)
        walked = [0] * len(parents)
        for row, parent in enumerate(parents[1:], start=1):
            walked[row] = walked[parent] + 1
            first = parents.index(parent) == row
            # A first child goes straight on; no other shares its parent's lane.
            assert (at[row][1] == at[parent][1]) == first
            assert at[row][1] >= at[parent][1]
        assert [depth for depth, _ in at] == walked
        # As many lanes as leaves: none is left empty.
        leaves = set(range(len(parents))) - set(parents)
        assert {lane for _, lane in at} == set(range(len(leaves)))


@pytest.mark.parametrize("parents", [(0,), (-1, 1), (-1, -1), (-1, 0, 3, 0)])
def test_parents_come_first(parents):
    with pytest.raises(ValueError, match=r"parents\[\d\] = .* must be an earlier row"):
        places(parents)


SHAPES = {
    "chain": chain(3).parents,
    "backbone": backbone(3, 3).parents,
    "bushy": branching((2, 3)).parents,
    "root": (-1,),
    "paths": paths([(0, 1), (2,)]).parents,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_drawn_tree_holds_every_token_once_and_an_edge_each(name):
    parents = SHAPES[name]
    labels = [f"token{row}" for row in range(len(parents))]
    notes = [f"q{row}" for row in range(len(parents))]
    svg = draw_trees([TreeView(name, parents, labels, notes, extra="own")])
    assert sorted(words(svg)) == sorted([name, *labels, *notes, "own"])
    bare = draw_trees([TreeView(name, (-1,), ["root"])])
    edges = svg.count("line2d") - bare.count("line2d")
    assert edges == len(parents)  # one to each drafted row, one to the target's own token


def test_the_accepted_path_is_shaded_by_depth():
    parents = backbone(2, 2).parents
    view = TreeView("tree", parents, list("abcde"), path=(1, 4))
    fills = re.findall(r"opacity: ([\d.]+)", draw_trees([view]))
    plain = re.findall(r"opacity: ([\d.]+)", draw_trees([TreeView("tree", parents, list("abcde"))]))
    for depth in (1, 2):
        strength = f"{opacity(depth):g}"
        assert strength in fills and strength not in plain


def test_two_trees_stand_beside_each_other():
    views = [TreeView(name, chain(2).parents, list("abc")) for name in ("left", "right")]
    both = Picture(draw_trees(views))._repr_svg_()
    one = Picture(draw_trees(views[:1]))._repr_svg_()
    width = lambda svg: float(re.search(r'width="([\d.]+)pt"', svg)[1])  # noqa: E731
    assert width(both) > 1.8 * width(one)
    assert words(draw_trees(views)).count("b") == 2
    assert width(Picture(draw_trees(4 * views))._repr_svg_()) == 690  # what a page has room for


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": ["a"]}, "labels and notes must have 3"),
        ({"notes": ["a"]}, "labels and notes must have 3"),
        ({"path": (3,)}, r"path: \(3,\) must hold rows 1 to 2"),
        ({"path": (0,)}, "path: "),
    ],
)
def test_views_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TreeView("tree", (-1, 0, 1), **({"labels": list("abc")} | change))


def test_cells_hold_their_texts_on_fills_as_strong_as_their_shares():
    texts, shares = [["a", "b"], ["c", ""]], np.array([[0.0, 0.25], [0.5, 1.0]])
    svg = draw_cells(texts, shares, ["first", "second"], ["left", "right"], "cells")
    assert set("abc") | {"first", "second", "left", "right"} <= set(words(svg))
    fills = [float(x) for x in re.findall(r"fill: #4a8fdc; opacity: ([\d.]+)", svg)]
    fills += [float(x) for x in re.findall(r"fill: #4a8fdc; fill-opacity: ([\d.]+)", svg)]
    assert sorted(fills)[-3:] == pytest.approx([0.075, 0.15, 0.3])


@pytest.mark.parametrize(
    "texts, shares, message",
    [
        ([["a"]], [[0.1, 0.2]], "texts: 1 rows of 2"),
        ([["a", "b"]], [[0.1]], "shares: 1 rows of 2"),
        ([["a", "b"]], [[0.1, 1.2]], "from 0 to 1"),
        ([["a", "b"]], [[0.1, float("nan")]], "from 0 to 1"),
    ],
)
def test_cells_that_do_not_fit_are_refused(texts, shares, message):
    with pytest.raises(ValueError, match=message):
        draw_cells(texts, shares, ["row"], ["one", "two"], "cells")


class Reader(HTMLParser):
    """The text of a page, and the style that each piece stands in."""

    def __init__(self, page):
        super().__init__()
        self.pieces, self.styles, self.tags = [], [""], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.styles.append(dict(attributes).get("style", ""))

    def handle_endtag(self, tag):
        self.styles.pop()

    def handle_data(self, data):
        self.pieces.append((data, self.styles[-1]))


def test_shaded_text_is_all_the_text_shaded_by_depth():
    pieces = [("def ", 0), ("f<T>", 1), (" &amp;\n", 2), ("  end", 40), ("", 3)]
    page = Reader(shaded(pieces, "# prompt <b>\n")._repr_html_())
    assert set(page.tags) == {"div", "pre", "span"}
    text = "".join(text for text, _ in page.pieces)
    assert text.endswith("# prompt <b>\n" + "".join(text for text, _ in pieces))
    styles = dict(page.pieces)
    assert f"{opacity(1):.2f})" in styles["f<T>"] and f"{opacity(2):.2f})" in styles[" &amp;\n"]
    assert f"{opacity(8):.2f})" in styles["  end"]  # deeper ones share the last shade
    assert "rgba" not in styles["def "]


def test_pictures_ask_nothing_of_the_network_and_have_a_size():
    svg = Picture(draw_cells([["x"]], [[1.0]], ["r"], ["c"], "one cell"))._repr_svg_()
    assert not re.search(r'(href|src)="(?!#)|url\((?!#)|<script|<image', svg)
    assert re.match(r'<svg [^>]*width="[\d.]+pt" height="[\d.]+pt"', svg)


def test_token_labels_are_one_visible_line():
    assert token_label(" a\n\tb") == "·a↵→b"
    assert token_label("x" * 40) == "x" * 9 + "…"
    assert token_label("\x00") == "�" and token_label("") == ""
    assert token_label("\n" + 8 * " ") == "↵·8" and token_label("  x\t\t\t") == "··x→3"
