"""Tables for pasting are never cut."""

import io

import pytest

from specjax.console import make_console, print_rows


@pytest.mark.parametrize("columns", [None, "20", "80"])
@pytest.mark.parametrize("soft_wrap", [False, True])
def test_a_table_is_as_wide_as_its_cells(monkeypatch, columns, soft_wrap):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    out = io.StringIO()
    cells = [("a" * 70, "[1, 2]", "b" * 70), ("c", "d", "e")]
    print_rows(make_console(out, soft_wrap), "first|second|third", cells, "A title")
    lines = out.getvalue().splitlines()
    assert all(cell in out.getvalue() for row in cells for cell in row)
    assert {len(line) for line in lines if line.startswith("|")} == {3 * 3 + 1 + 70 + 6 + 70}
    assert "A title" in out.getvalue()
