"""Imports point one way, as docs/architecture.md says."""

import ast
import pathlib

import pytest

import specjax

ROOT = pathlib.Path(specjax.__file__).parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
RULES = {  # modules below a path of specjax -> what none of them may import
    "": ("experiments", "benchmarks", "configs"),
    "models/": ("specjax.drafters",),
    "cache.py": ("specjax.drafters",),
    "trees.py": ("specjax.drafters",),
    "sampling.py": ("specjax.drafters",),
    "interchange/": (
        "specjax.verification", "specjax.decoding", "specjax.training", "specjax.evaluation",
    ),
    "drafters/": ("specjax.verification", "specjax.training", "specjax.evaluation"),
    "data/": ("specjax.training", "specjax.planning", "specjax.evaluation"),
    "training/": ("specjax.evaluation", "specjax.planning.programs", "specjax.planning.estimate"),
    "planning/": ("specjax.evaluation",),
    "planning/program.py": ("specjax.training",),  # training counts with these two
    "planning/accelerators.py": ("specjax.training",),
}  # fmt: skip


def imported(source: str) -> set[str]:
    """Every module that the source names, and every name that it takes from one."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("below", RULES)
def test_nothing_imports_what_it_must_not_know(below):
    paths = [path for path in MODULES if path.startswith(below)]
    assert paths
    for path in paths:
        for name in imported((ROOT / path).read_text("utf-8")):
            bad = [top for top in RULES[below] if f"{name}.".startswith(f"{top}.")]
            assert not bad, f"specjax/{path} imports {name}"
