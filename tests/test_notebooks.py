"""The notebooks run top to bottom, and stand here as they ran: whole, small, of no one machine."""

import json
import os
import pathlib
import re

import pytest

from specjax.evaluation.inspection import inspect_run

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEGABYTE = 1 << 20


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    """What the cells printed or returned as text."""
    parts = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            parts.append(output.get("text") or output.get("data", {}).get("text/plain") or "")
    return "\n".join(parts)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["anatomy_of_a_draft", "quickstart", "read_a_run"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stands_as_it_ran(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/svg+xml" in o.get("data", {}) for o in outputs) >= 4
    assert path.stat().st_size < MEGABYTE


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_name_no_place_and_show_no_bars(path):
    text = json.dumps([cell.outputs for cell in code_cells(read(path))])
    assert not re.findall(r"(?<![\w.<*:/-])/\w[\w.-]*/[\w./-]*", text)
    assert not re.findall(r"\\r|it/s|\d+/\d+, \d+ s left|resuming at step|@0x|object at 0x", text)


def test_all_begin_alike():
    first = {code_cells(read(path))[0].source.split("\n\nRUN =")[0] for path in NOTEBOOKS}
    assert len(first) == 1


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


def run(name, workdir, monkeypatch, **environment):
    """A notebook's text outputs after running it at the smallest budget."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for key, value in ({"SPECJAX_NOTEBOOK_PRESET": "smoke"} | environment).items():
        monkeypatch.setenv(key, value)
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    resources = {"metadata": {"path": str(workdir)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    return printed(notebook)


@pytest.mark.slow
def test_quickstart_then_the_notebooks_that_read_it(workdir, monkeypatch):
    """One test, for the others take the first one's run folder; a second pass would resume it."""
    text = run("quickstart", workdir, monkeypatch)
    for line in ("equal: True", "same tokens: True", "same rounds: True", "4/4"):
        assert line in text
    folder = workdir / "runs" / "quickstart-builtin-float32-smoke"
    assert inspect_run(folder).missing == ()

    text = run("read_a_run", workdir, monkeypatch, SPECJAX_RUN=str(folder))
    assert "complete, 4 rows" in text and "fasteagle-temp-0.0: 4 of 4 equal" in text
    (folder / "results.json").unlink()
    text = run("read_a_run", workdir, monkeypatch, SPECJAX_RUN=str(folder))
    assert "INCOMPLETE" in text and "has not finished" in text

    text = run("anatomy_of_a_draft", workdir, monkeypatch)
    assert "new in one pass:" in text
    (folder,) = (workdir / "runs").glob("anatomy-*")
    assert not (folder / "drafters" / "fasteagle").exists()
