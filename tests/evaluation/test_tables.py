"""Tables: every number is there at every width, and nothing but plain text outside a terminal."""

import io

import pytest

from specjax.evaluation.tables import count, is_unfaithful, print_table, verdict


@pytest.fixture
def printed(monkeypatch):
    """What print_table writes to a pipe when `columns` are given, 120 when they are not."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def run(rows, columns=None):
        if columns:
            monkeypatch.setenv("COLUMNS", str(columns))
        out = io.StringIO()
        print_table(rows, file=out)
        return out.getvalue()

    return run


@pytest.mark.parametrize("columns", [None, 80, 100, 120, 200])
def test_fits_and_says_everything(printed, make_rows, columns):
    rows = make_rows(("builtin", "gsm8k"), (0.0, 1.0), ("eagle3", "fasteagle/best"))
    text = printed(rows, columns)
    assert max(map(len, text.splitlines())) <= (columns or 120)
    assert text.isascii() and text.isprintable() is False and "\x1b" not in text
    for row in rows:
        assert f"{row['tau']:.2f}" in text
        assert f"{row['speedup']:.2f}x" in text
        assert " ".join(f"{100 * share:.0f}" for share in row["acceptance_by_depth"]) in text
        assert f"{row['break_even_tau']:.2f}" in text
        if row["method"] != "vanilla":
            assert "[{:.2f}, {:.2f}]".format(*row["speedup_ci95"]) in text
    for piece in ("reference", "8/8", "2.1M", "100k", "8, 3", "+25%", "fasteagle/best", "gsm8k"):
        assert piece in text


def test_a_line_a_row(printed, make_rows):
    rows = make_rows(temperatures=(0.0, 1.0))
    assert printed(rows, 200).count("fasteagle") == 2
    assert len(printed(rows, 200).splitlines()) == 3 + len(rows)
    assert printed(rows, 120).count("fasteagle") == 4
    assert printed(rows, 80).count("fasteagle") == 6


@pytest.mark.parametrize("columns", [20, 40, 60])
def test_a_narrow_terminal_breaks_nothing(printed, make_rows, columns):
    assert max(map(len, printed(make_rows(), columns).splitlines())) <= columns


def test_no_rows_is_an_empty_table(printed):
    assert "method" in printed([])


def test_a_slowdown_is_red_on_a_terminal_only(make_rows, monkeypatch, printed):
    rows = make_rows()
    rows[2] |= {"speedup": 0.8}
    assert "\x1b" not in printed(rows, 200)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    print_table(rows, file=out)
    assert out.getvalue().count("\x1b[31m") == 1


def test_batch_and_seed_show_where_they_vary(printed, make_rows):
    rows = make_rows()
    assert "seed" not in printed(rows)
    rows[1] |= {"seed": 1, "batch": 4}
    assert "seed" in printed(rows, 200) and " B " in printed(rows, 200)
    assert "seed" in printed(rows, 80) and "builtin T=0 B=4" in printed(rows, 80)


@pytest.mark.parametrize(
    ("lossless", "words", "bad"),
    [
        ({"kind": "identical", "checked": 80, "identical": 80, "ties": 0}, "80/80", False),
        ({"kind": "identical", "checked": 80, "identical": 79, "ties": 1}, "79/80 + 1 tie", False),
        ({"kind": "identical", "checked": 80, "identical": 77, "ties": 2}, "77/80 + 2 ties", True),
        ({"kind": "distribution", "test": "G", "p_value": 0.4301}, "p=0.43", False),
        ({"kind": "distribution", "test": "G", "p_value": 1e-9}, "p<0.001", True),
        ({"kind": "lossy", "divergence": 0.1}, "lossy", True),
    ],
)
def test_verdicts(lossless, words, bad):
    row = {"method": "fasteagle", "lossless": lossless}
    assert verdict(row) == words
    assert is_unfaithful(row) is bad
    assert verdict(row | {"method": "vanilla"}) == "reference"


def test_counts():
    numbers = (0, 950, 2_100_000, 100_000, 70_600_000_000, 8_030_000_000, 999_900)
    assert list(map(count, numbers)) == ["0", "950", "2.1M", "100k", "70.6B", "8.03B", "1M"]
