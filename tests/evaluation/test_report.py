"""The page: whole, well-formed, self-contained, escaped, and written in one step."""

import os
import re
import xml.dom.minidom
from html.parser import HTMLParser

import pytest

from specjax.evaluation import figures, report
from specjax.evaluation.report import read_curves, write_report

EVIL = "<script>alert('&')</script>"
VOID = {"meta", "br", "path", "use", "image", "rect"}


class Page(HTMLParser):
    """Collects tags, ids and text, and sees to it that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.words, self.open = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "stage": "train/fasteagle", "loss": 5.0, "tau": 1.0}\n'
        '{"step": 20, "stage": "train/fasteagle", "loss": 3.5}\n'
        '{"step": 10, "stage": "train/fasteagle", "loss": 4.0}\n'
        '{"step": 20, "stage": "train/fasteagle", "loss": 3.0, "tau": 2.0}\n'
        '{"step": 30, "stage": "train/fasteagle", "loss": NaN}\n'
        '{"step": 5, "stage": "train/eagle3", "loss": 6.0}\n'
        '{"stage": "generate", "tokens": 10}\n'
        "7\n"
        '{"step": 40, "stage": "train/fast'
    )
    return path


@pytest.fixture
def page(tmp_path, header, make_rows, metrics):
    """Writes a report of everything, with markup wherever a user's text may stand."""

    def make(**changes):
        rows = make_rows((EVIL, "gsm8k $x$"), (1.0,), ("eagle3", "fasteagle/<best>"))
        results = header | {"preset": EVIL, "rows": rows}
        results["target"] = results["target"] | {"name": EVIL}
        pieces = [("def f(x):", 0), ("\n    return", 1), (EVIL, 2), (" x", 99), ("", 3)]
        arguments = {
            "metrics_path": metrics,
            "samples": [{"method": EVIL, "prompt": EVIL, "pieces": pieces}],
            "notes": [EVIL, "a note"],
        }
        path = tmp_path / "report.html"
        write_report(path, results, **(arguments | changes))
        return path.read_text()

    return make


def test_page_is_well_formed_and_says_everything(page):
    text = page()
    parsed = Page(text)
    words = " ".join(parsed.words)
    for expected in ("What ran on what", "cpu, 2 cores", "specjax 0.1.0", "Results", "a note",
                     "Training loss", "Where a round's time goes", "break-even tau", "draft depth",
                     "What the numbers mean", "gsm8k $x$ T=1", "fasteagle/<best>"):  # fmt: skip
        assert expected in words, expected
    # tau, speedup, both, cost, rounds; two settings of acceptance; loss and tau while training.
    assert parsed.tags.count("svg") == 5 + 2 + 2
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.tags.count("table") == 1
    assert {"depth 1", "depth 2", "depth 8"} <= set(parsed.words)


def test_page_is_self_contained(page):
    text = page()
    assert "script" not in Page(text).tags
    assert "link" not in Page(text).tags and "img" not in Page(text).tags
    assert "://" not in text and "@import" not in text
    references = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', text)
    assert references and all((a or b).startswith("#") for a, b in references)
    assert {(a or b)[1:] for a, b in references} <= set(Page(text).ids)
    assert figures.INK not in text and "currentColor" in text


def test_user_text_is_escaped(page):
    text = page()
    assert EVIL not in text and "<best>" not in text
    assert text.count("&lt;script&gt;") > 5


def test_page_does_without_the_optional_parts(tmp_path, page, make_rows, header):
    text = page(metrics_path=tmp_path / "absent.jsonl", samples=None, notes="just one")
    assert "<h2>Training</h2>" not in text and "<h2>Samples</h2>" not in text
    assert "<p>just one</p>" in text
    for rows in (make_rows(methods=()), []):
        write_report(tmp_path / "report.html", header | {"rows": rows})
        Page((tmp_path / "report.html").read_text())


def test_page_says_when_nothing_beats_vanilla(tmp_path, header, make_rows):
    rows = make_rows()
    rows[1] |= {"speedup": 0.9}
    rows[2] |= {"speedup": 1.9, "exact": False}
    write_report(tmp_path / "report.html", header | {"rows": rows})
    text = (tmp_path / "report.html").read_text()
    assert "none beats vanilla; nearest is <b>eagle3</b> at <b>0.90x</b>" in text


def test_same_rows_same_figure(make_rows):
    rows = make_rows()
    assert figures.draw_tau(rows) == figures.draw_tau(rows)


def test_many_methods_look_different(make_rows):
    one = make_rows()[1]
    rows = [one | {"method": f"m{i}"} for i in range(20)]
    looks = {(row["colour"], row["marker"]) for row in figures._drafted(rows)}
    assert len(looks) == len(rows)


def test_a_figure_is_a_file_of_its_own_too(make_rows):
    text = figures.standalone(figures.draw_speedups(make_rows()))
    assert xml.dom.minidom.parseString(text).documentElement.tagName == "svg"


def test_a_failed_write_keeps_the_old_page(tmp_path, page, monkeypatch):
    old = tmp_path / "report.html"
    old.write_text("the old page")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*report\.html"):
        page(notes="changed")
    assert old.read_text() == "the old page"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "metrics.jsonl"}


def test_curves_skip_what_is_broken_and_take_the_last_word(metrics):
    curves = read_curves(metrics)
    assert curves == {
        "loss": {"train/fasteagle": ((0, 10, 20), (5.0, 4.0, 3.0)), "train/eagle3": ((5,), (6.0,))},
        "tau": {"train/fasteagle": ((0, 20), (1.0, 2.0))},
    }


def test_thinning_keeps_the_mean_and_the_order():
    steps, values = list(range(1200)), [float(step % 7) for step in range(1200)]
    thin_steps, thin_values = figures.thin_out(steps, values)
    assert len(thin_steps) == 300 and sorted(thin_steps) == list(thin_steps)
    assert sum(thin_values) / 300 == pytest.approx(sum(values) / 1200)
    assert figures.thin_out(steps[:10], values[:10]) == (steps[:10], values[:10])


def test_round_parts_never_go_below_nothing():
    noisy = {"draft_ms": 2.0, "verify_ms": 4.0, "round_ms": 5.0}
    assert figures._round_parts([noisy]) == (2.0, 4.0, 0.0, 5.0)


def test_shades_are_all_in_the_style():
    assert all(f".d{depth} " in report._STYLE for depth in range(1, report.SHADES + 1))
