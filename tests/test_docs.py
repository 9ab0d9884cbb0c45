"""The documentation cannot rot unseen: what it links, names and commands must exist.

Blocks fenced as ```bash run or ```python run are executed (slow), each in a folder of its own; what
they print is not compared, since it holds times. All other blocks are only read for the flags and
fields they give. Names in capitals (NAME, FOLDER, RUN) are the reader's to fill in.
"""

import dataclasses
import importlib
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from configs import common
from specjax.distillation.divergences import DIVERGENCES
from specjax.distillation.gates import GATES
from specjax.drafters import DRAFTERS
from specjax.evaluation.results import FURTHER_KEYS, HEADER_KEYS, LOSSLESS_KEYS, ROW_KEYS
from specjax.evaluation.tables import COLUMNS
from specjax.models.config import FAMILIES
from specjax.verification import get_rule, rule_names

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("specjax/**/*.md")]
MARGIN = 120
FENCE = re.compile(r"^```(\w*)( run)?[^\n]*\n(.*?)^```$", re.M | re.S)
SECTIONS = ("data", "train", "eval", "calibrate")  # of a config, as prose names their fields

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def read(name: str) -> str:
    return (ROOT / name).read_text()


def is_placeholder(text: str) -> bool:
    return re.search(r"[A-Z]{3}|\.\.\.", text) is not None


def quoted(text: str) -> list[str]:
    """What stands in backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def slugs(text: str) -> set[str]:
    """The anchors that headings get on GitHub."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


# ---- checks: (page, its text) -> complaints ------------------------------------------------------


def broken_links(page: pathlib.Path, text: str):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            yield f"link {link}: no such file"
        elif anchor and anchor not in slugs(file.read_text()):
            yield f"link {link}: no such heading"


def unknown_names(page: pathlib.Path, text: str):
    for name in quoted(text):
        dotted = re.match(r"(specjax|experiments|benchmarks|configs)(\.\w+)+", name)
        if dotted and not is_placeholder(dotted[0]) and not resolves(dotted[0]):
            yield f"`{name}`: no such module or name"


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one.

    Programs are not imported, for their flags would meet in one process.
    """
    parts = dotted.split(".")
    if parts[0] in ("experiments", "benchmarks"):
        source = ROOT / parts[0] / f"{parts[1]}.py"
        return source.is_file() and all(
            re.search(rf"\b{n}\b", source.read_text()) for n in parts[2:]
        )
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def missing_files(page: pathlib.Path, text: str):
    for name in quoted(text):
        if not re.fullmatch(r"[\w./-]+\.(py|md|npz|svg|png)", name) or is_placeholder(name):
            continue
        if not any((parent / name).exists() for parent in (ROOT, ROOT / "specjax", page.parent)):
            yield f"`{name}`: no such file"


def programs() -> dict[str, set[str]]:
    """Module -> the flags it defines."""
    sources = [*ROOT.glob("experiments/*.py"), *ROOT.glob("benchmarks/*.py")]
    found = {
        f"{s.parent.name}.{s.stem}": set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', s.read_text()))
        for s in sources
    }
    return {module: flags for module, flags in found.items() if flags}


# First words of flags of gcloud, Slurm, the hub's client, uv and the trace viewers.
OTHERS = set(
    "zone node accelerator runtime spot worker command token include local force job nodes ntasks "
    "gpus cpus mem time requeue signal open output kill version python logdir".split()
)


def unknown_flags(page: pathlib.Path, text: str):
    known = programs()
    every = set().union(*known.values())
    joined = re.sub(r"(\\\n|\n +)(?=\[?--)", " ", text)  # a command over several lines is one
    for line in joined.splitlines():
        command = re.search(r"python -m ([\w.]+)", line)
        allowed = every
        if command and command[1] in known:
            allowed = known[command[1]]
        elif command and not is_placeholder(command[1]) and not resolves(command[1]):
            yield f"python -m {command[1]}: no such module"
        for flag in re.findall(r"(?<![\w-])--([a-z]\w*)", line):
            if flag not in allowed | OTHERS and not flag.startswith("xla_"):
                yield f"--{flag}: {command[1] if command else 'no program'} does not know it"


def recipe(line: str):
    """(path, preset) of the recipe that a command names, or None."""
    found = re.search(r"--config=(configs/[\w/]+)\.py:?(\w*)", line)
    return None if found is None or is_placeholder(found[1]) else found.groups()


def config_of(path: str, preset: str):
    """The config of a recipe; raises ModuleNotFoundError or ValueError."""
    module = importlib.import_module(path.replace("/", "."))
    return module.get_config("" if is_placeholder(preset) else preset)


def unknown_recipes(page: pathlib.Path, text: str):
    for path, preset in filter(None, map(recipe, text.splitlines())):
        try:
            config_of(path, preset)
        except (ModuleNotFoundError, ValueError) as error:
            yield f"{path}.py:{preset}: {error}"


def unknown_fields(page: pathlib.Path, text: str):
    base = common.base("", "")
    given = []  # (config, field)
    for line in text.splitlines():
        config = config_of(*recipe(line)) if recipe(line) else base
        given += [(config, field) for field in re.findall(r"--config\.([a-z_.]+)", line)]
    for name in quoted(text):
        given += [(base, field) for field in re.findall(r"(?<![\w.-])config\.([a-z_.]+)", name)]
        if found := re.match(rf"({'|'.join(SECTIONS)})\.[a-z][a-z_.]*", name):
            given.append((base, found[0]))
    for config, field in given:
        path = field.strip(".").split(".")
        if path[0] == "field" or path[-1] in ("json", "py"):  # the reader's, or a file
            continue
        for part in path:
            if not hasattr(config, "keys") or part not in config:
                yield f"{field}: no such field of a config"
                break
            config = config[part]


def wide_lines(page: pathlib.Path, text: str):
    for line in FENCE.sub("", text).splitlines():
        if len(line) > MARGIN and not line.startswith(("|", "    ", "![")):
            yield f"{len(line)} columns: {line[:60]}"


CHECKS = (
    broken_links, unknown_names, missing_files, unknown_flags, unknown_fields, unknown_recipes,
    wide_lines,
)  # fmt: skip


@every_page
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_what_a_page_says_is_there(check, page):
    assert list(check(page, page.read_text())) == []


WRONG = {
    broken_links: "[a](nowhere.md) and [b](../README.md#no-such-heading)",
    unknown_names: "`specjax.generate` but `specjax.genarate(x)` and `experiments.nothing`",
    missing_files: "`specjax/cache.py`, `models/config.py` but `specjax/cash.py`, `models/none.py`",
    unknown_flags: "`--temperature` but `--temprature`\n\n    python -m experiments.main --compare",
    unknown_fields: "`train.steps` but `train.stepz` and\n\n    python -m experiments.main "
    "--config=configs/medusa.py --config.drafters.medusa.init.heads=2 --config.data.lenght=3",
    unknown_recipes: "--config=configs/fasteagle.py:smoke\n--config=configs/fasteagle.py:smok\n"
    "--config=configs/slow.py",
    wide_lines: f"{'a ' * 61}\n{'a ' * 61}",
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_every_check_finds_what_is_wrong(check):
    assert len(list(check(ROOT / "docs" / "page.md", WRONG[check]))) == 2


# ---- nothing is left out -------------------------------------------------------------------------


def test_every_page_can_be_reached():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
        todo += [(page.parent / link).resolve() for link in links if not re.match(r"\w+:", link)]
    assert set(ROOT.glob("docs/**/*.md")) <= seen


LISTED = {
    "README.md": (*DRAFTERS, *rule_names()),
    "docs/drafters.md": DRAFTERS,
    "docs/verification.md": rule_names(),
    "docs/distillation.md": (*DIVERGENCES, *GATES),
}


@pytest.mark.parametrize("name", LISTED)
def test_every_method_is_listed(name):
    assert set(LISTED[name]) <= set(quoted(read(name)))


def test_the_map_shows_every_module():
    house = read("docs/architecture.md").partition("## The house")[2].partition("\n## ")[0]
    modules = [m for m in (ROOT / "specjax").iterdir() if not m.name.startswith("_")]
    programs = [m for m in (ROOT / "experiments").glob("*.py") if not m.name.startswith("_")]
    names = {m.name for m in (*modules, *programs)} | {"configs", "benchmarks", "docs", "tests"}
    assert names <= set(re.findall(r"[\w.]+", house))


def test_every_family_is_listed():
    text = read("README.md").lower()
    assert all(family in text for family in FAMILIES)


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_field_of_a_drafter_is_described(name):
    fields = {f.name for f in dataclasses.fields(DRAFTERS[name]) if not f.kw_only} - {"target"}
    section = read("docs/drafters.md").partition("## Fields")[2]
    assert fields <= set(re.findall(r"\w+", " ".join(quoted(section))))


@pytest.mark.parametrize("name", rule_names())
def test_every_parameter_of_a_rule_is_described(name):
    fields = {f.name for f in dataclasses.fields(get_rule(name))}
    assert fields <= set(quoted(read("docs/verification.md")))


def test_every_column_and_key_is_defined():
    text = read("docs/metrics.md")
    verdicts = [key for keys in LOSSLESS_KEYS.values() for key in keys]
    keys = {*HEADER_KEYS, *ROW_KEYS, *FURTHER_KEYS, *verdicts}
    assert keys <= set(quoted(text))
    cells = {c.strip() for row in re.findall(r"^\| ([^|]*) \|", text, re.M) for c in row.split(",")}
    cells |= {row.strip() for row in re.findall(r"^\| ([^|]*) \|", text, re.M)}
    assert {column.heading.replace("\n", " ") for column in COLUMNS.values()} <= cells


# ---- what is marked is run -----------------------------------------------------------------------


def marked() -> list:
    """(page, language, code) of every block to run."""
    return [
        pytest.param(language, code, id=f"{page.name}-{i}")
        for page in PAGES
        for i, (language, run, code) in enumerate(FENCE.findall(page.read_text()))
        if run
    ]


def test_some_blocks_are_marked():
    assert len(marked()) >= 4
    assert {block.values[0] for block in marked()} == {"bash", "python"}


@pytest.mark.slow
@pytest.mark.parametrize("language, code", marked())
def test_marked_blocks_run(language, code, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # commands name recipes by path
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    cache = jax.config.jax_compilation_cache_dir  # the tests' own: a block compiles once
    bin_folder = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env=os.environ
        | {"PYTHONPATH": paths, "PATH": bin_folder, "JAX_COMPILATION_CACHE_DIR": cache},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "a block that prints nothing shows nothing"
