"""The page: whole, well-formed, self-contained, escaped, and written in one step."""

import html
import json
import os
import re
import subprocess
import sys
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path

import pytest

from specjax.evaluation import figures, inline_svg, page
from specjax.evaluation.report import render, report_run
from specjax.evaluation.results import write_results
from specjax.evaluation.run_folder import Run, read_curves, read_run, write_samples
from specjax.shades import SHADES

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('&')</script>"
VOID = {"meta", "br", "wbr", "path", "use", "image", "rect"}


class Page(HTMLParser):
    """Collects tags, ids and text, and sees to it that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.words, self.open, self.scopes = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.scopes += [dict(attributes).get("scope")] if tag == "th" else []
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
        '{"step": 0, "stage": "train/fasteagle", "loss": 5.0, "tau": 1.0, "agree_1": 0.1}\n'
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
def folder(tmp_path, header, make_rows, metrics):
    """Makes a finished run folder of everything, with markup wherever a user's text may stand."""

    def make(**changes):
        rows = make_rows((EVIL, "gsm8k $x$"), (1.0,), ("eagle3", "fasteagle/<best>"))
        results = header | {"preset": EVIL} | changes
        results["target"] = results["target"] | {"name": EVIL}
        rows = results.pop("rows", rows)
        write_results(tmp_path / "results.json", results, rows)
        pieces = [("def f(x):", 0), ("\n    return", 1), (EVIL, 2), (" x", 99), ("", 3)]
        samples = [{"method": EVIL, "prompt": EVIL, "pieces": pieces}]
        write_samples(tmp_path / "samples.json", samples, [EVIL, "a note"])
        config = {"config": {"name": EVIL}, "overrides": {"train.steps": EVIL}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


PAGES = []


@pytest.fixture
def drawn(folder):
    """The page of that folder, drawn once for all tests."""
    if not PAGES:
        PAGES.append(report_run(folder()).read_text())
    return PAGES[0]


def test_page_is_well_formed_and_says_everything(drawn):
    parsed = Page(drawn)
    words = " ".join(parsed.words)
    for expected in ("What ran on what", "cpu, 2 cores", "specjax 0.1.0", "Results", "a note",
                     "Training loss", "Agreement at depth 1", "Decode-time tau", "Notes",
                     "Where a round's time goes, T=1", "breaks even", "draft depth",
                     "What the numbers mean", "gsm8k $x$ T=1", "train.steps="):  # fmt: skip
        assert expected in words, expected
    # tau, speedup, rounds; acceptance and cost of two settings; three while training.
    assert parsed.tags.count("svg") == 3 + 2 * 2 + 3
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.tags.count("table") == 1
    assert {"depth 1", "depth 2", "depth 8"} <= set(parsed.words)


def test_page_can_be_heard(drawn):
    """Headings descend by one, table heads say what they head, figures say what they show."""
    text = drawn
    parsed = Page(text)
    levels = [int(tag[1]) for tag in parsed.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert set(parsed.scopes) == {"col", "row", "rowgroup"}
    labels = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]*)"', text)
    assert len(labels) == parsed.tags.count("svg")
    for row in Results(text).rows:
        if len(row) > 1 and row[0] != "vanilla":
            speedup = row[1].removesuffix("x")
            assert any(row[0] in html.unescape(label) and speedup in label for label in labels)


class Results(HTMLParser):
    """The table's lines, as the texts of their cells without what stands below."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.cell = [], False
        self.feed(text[text.index("<tbody>") : text.index("</table>")])

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        self.cell = tag != "small"

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def test_every_line_of_the_table_has_every_column(drawn):
    text = drawn
    lines = [row for row in Results(text).rows if len(row) > 1]
    assert len(lines) == 2 * 3
    assert {len(row) for row in lines} == {text[: text.index("</thead>")].count('scope="col"')}


def test_the_table_leads_with_what_to_look_at_and_stands_in_the_figures_order(header, make_rows):
    rows = make_rows(methods=("slow", "fast"))
    rows = [r | {"speedup": {"slow": 0.5, "fast": 2.0}.get(r["method"], 1.0)} for r in rows]
    text = render(Run(header | {"rows": rows}))
    assert re.findall(r'<th scope="col"[^>]*>(\w+)', text)[:3] == ["method", "speedup", "lossless"]
    lines = [row[:2] for row in Results(text).rows if len(row) > 1]
    assert lines == [["vanilla", "1.00x"], ["fast", "2.00x"], ["slow", "0.50x"]]


def test_bold_is_the_highest_of_the_exact_ones(header, make_rows):
    rows = make_rows(methods=("a", "b", "c"))
    for row, tau, exact in zip(rows[1:], (2.0, 2.5, 9.0), (True, True, False), strict=True):
        row |= {"tau": tau, "exact": exact}
    text = render(Run(header | {"rows": rows}))
    assert re.findall(r'<td class="best">([0-9.]+)<', text) == ["2.50"]
    assert "c (lossy)" in text


def test_samples_come_back_whole(folder):
    run = read_run(folder())
    assert run.samples[0]["pieces"][2] == [EVIL, 2] and run.notes == [EVIL, "a note"]
    assert run.overrides == {"train.steps": EVIL}


def test_an_older_folder_has_a_page_without_samples(folder):
    where = folder()
    (where / "samples.json").unlink()
    text = report_run(where).read_text()
    assert 'id="samples"' not in text and 'id="results"' in text


@pytest.mark.parametrize("missing", [["results.json"], ["config.json"], ["metrics.jsonl"],
                                     ["results.json", "config.json"]])  # fmt: skip
def test_an_unfinished_folder_is_named_with_what_it_lacks(folder, missing):
    where = folder()
    for name in missing:
        (where / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        report_run(where)
    assert str(where) in str(error.value) and all(name in str(error.value) for name in missing)
    assert not (where / "report.html").exists()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("config.json", "{", "config.json: Expecting"),
        ("config.json", '{"config": {}}', 'config.json: no dict "overrides"'),
        ("samples.json", '{"samples": {}, "notes": []}', 'samples.json: no list "samples"'),
        ("samples.json", '{"samples": [{}], "notes": []}', "samples.json: sample 0: expected"),
        ("samples.json", '{"samples": [], "notes": [7]}', "samples.json: notes"),
        ("results.json", '{"rows": [{}]}', "results.json: header: lacks"),
    ],
)
def test_a_broken_file_is_named(folder, name, text, message):
    where = folder()
    (where / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        report_run(where)
    assert not (where / "report.html").exists()


def test_the_command_draws_the_same_page_or_says_what_is_missing(folder, drawn):
    where = folder()
    command = [sys.executable, "-m", "experiments.report", f"--workdir={where}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == str(where / "report.html"), done.stderr
    assert (where / "report.html").read_text() == drawn
    (where / "results.json").unlink()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.strip().startswith(f"{where}: lacks results.json")


def test_page_is_self_contained(drawn):
    text = drawn
    assert "script" not in Page(text).tags
    assert "link" not in Page(text).tags and "img" not in Page(text).tags
    assert "://" not in text and "@import" not in text
    references = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', text)
    assert references and all((a or b).startswith("#") for a, b in references)
    assert {(a or b)[1:] for a, b in references} <= set(Page(text).ids)
    assert inline_svg.INK not in text and "currentColor" in text


def test_user_text_is_escaped(drawn):
    text = drawn
    assert EVIL not in text and "<best>" not in text
    assert text.count("&lt;script&gt;") > 5


def test_page_does_without_the_optional_parts(make_rows, header):
    for rows in (make_rows(), make_rows(methods=()), []):
        text = render(Run(header | {"rows": rows}, notes=["just one"]))
        Page(text)
        assert 'id="training"' not in text and 'id="samples"' not in text
        assert "<li>just one</li>" in text


def test_page_says_when_nothing_beats_vanilla(header, make_rows):
    rows = make_rows()
    rows[1] |= {"speedup": 0.9}
    rows[2] |= {"speedup": 1.9, "exact": False}
    text = render(Run(header | {"rows": rows}))
    assert "<strong>0.90×</strong><span>none beats vanilla; nearest is <b>eagle3</b>" in text


@pytest.mark.slow
def test_ten_methods_stay_well_under_a_megabyte(header, make_rows):
    rows = make_rows(temperatures=(0.0, 1.0), methods=[f"method_{i}" for i in range(10)])
    assert len(render(Run(header | {"rows": rows})).encode()) < 600_000


def test_same_rows_same_figure(make_rows):
    rows = make_rows()
    assert figures.draw_tau(rows) == figures.draw_tau(rows)


def test_a_figure_is_a_file_of_its_own_too(make_rows):
    text = inline_svg.standalone(figures.draw_speedups(make_rows()))
    assert xml.dom.minidom.parseString(text).documentElement.tagName == "svg"


def test_a_failed_write_keeps_the_old_page(tmp_path, folder, monkeypatch):
    folder()
    kept = {path.name for path in tmp_path.iterdir()}
    old = tmp_path / "report.html"
    old.write_text("the old page")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*report\.html"):
        report_run(tmp_path)
    assert old.read_text() == "the old page"
    assert {path.name for path in tmp_path.iterdir()} == kept | {"report.html"}


def test_curves_skip_what_is_broken_and_take_the_last_word(metrics):
    curves = read_curves(metrics)
    assert curves == {
        "loss": {"train/fasteagle": ((0, 10, 20), (5.0, 4.0, 3.0)), "train/eagle3": ((5,), (6.0,))},
        "agree_1": {"train/fasteagle": ((0,), (0.1,))},
        "tau": {"train/fasteagle": ((0, 20), (1.0, 2.0))},
    }


def test_shades_are_all_in_the_style():
    assert all(f".d{depth} " in page.STYLE for depth in range(1, SHADES + 1))
