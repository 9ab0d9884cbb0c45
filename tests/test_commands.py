"""How every program ends where its command line is wrong: in words, with status 2."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = """
import pathlib
from absl import app, flags
from ml_collections import config_flags
from experiments import commands

COUNT = flags.DEFINE_integer("count", 1, "")
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)

def main():
    commands.tried("file", pathlib.Path("/nowhere").open if COUNT.value == 2 else print)
    if COUNT.value == 3:
        commands.tried("rule", int, "three")
    if COUNT.value == 4:
        raise commands.usage_error("rule", "rule: unknown")
    if COUNT.value == 5:
        raise app.UsageError("two\\nlines")

commands.run(main)
"""


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True
    )


RECIPE = "--config=configs/fasteagle.py"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["surplus"], "unexpected argument 'surplus'"),
        (["--nope"], "flag 'nope'"),
        (["--count=many"], "--count=many"),
        (["--count=2"], "--file: [Errno 2] No such file or directory: '/nowhere'"),
        (["--count=3"], "--rule: invalid literal"),
        (["--count=4"], ": --rule: unknown"),
        (["--count=5"], ": two\nlines"),
        (["--config=configs/nope.py"], "configs/nope.py"),
        (["--config=configs/nope.py", "--config.seed=1"], "configs/nope.py"),
        ([RECIPE + ":nope"], "unknown preset 'nope'"),
        ([RECIPE, "--config.train.stepz=1"], "stepz"),
        ([RECIPE, "--config.train.steps=many"], "config.train.steps=many"),
    ],
)
def test_what_is_wrong_is_named(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.startswith("-c: ")


def test_a_recipe_s_own_mistake_keeps_its_traceback(tmp_path):
    recipe = tmp_path / "wrong.py"
    recipe.write_text("def get_config(preset=''):\n    return preset.nothing\n")
    done = run(f"--config={recipe}")
    assert done.returncode == 1 and f'"{recipe}", line 2' in done.stderr
    assert run(RECIPE, "--config.train.steps=3").returncode == 0


def test_every_program_ends_this_way():
    programs = [
        path
        for folder in ("experiments", "benchmarks")
        for path in (ROOT / folder).glob("*.py")
        if "__main__" in path.read_text()
    ]
    assert len(programs) > 9
    for path in programs:
        text = path.read_text()
        assert re.search(r"^    commands\.run\(main\)$", text, re.M), path
        assert "app.run" not in text and "exitcode" not in text, path
