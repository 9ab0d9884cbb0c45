"""Text to train on: the running Python's own standard library, and local files.

The standard library is the one corpus that every machine with Python already has. A fixed list of
whole modules is held out of training, so that evaluation prompts read from them are unseen.
"""

import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "heldout", "all")

# Whole modules that exist in Python 3.11, 3.12 and 3.13 and have no near copy elsewhere in the
# library (as decimal has in _pydecimal). A package's name would hold out all its submodules.
HELDOUT_MODULES: tuple[str, ...] = (
    "argparse",
    "bisect",
    "calendar",
    "cmd",
    "code",
    "colorsys",
    "configparser",
    "csv",
    "difflib",
    "filecmp",
    "fileinput",
    "fractions",
    "getpass",
    "graphlib",
    "gzip",
    "heapq",
    "html.parser",
    "http.cookies",
    "json.decoder",
    "logging.config",
    "mimetypes",
    "netrc",
    "pprint",
    "queue",
    "reprlib",
    "sched",
    "secrets",
    "selectors",
    "shelve",
    "shlex",
    "statistics",
    "tabnanny",
    "tempfile",
    "textwrap",
    "timeit",
    "urllib.robotparser",
    "wsgiref.headers",
    "xml.sax.saxutils",
    "zipapp",
)

# Not the library itself: tests, demonstrations, bundled installers, generated help text.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "__pycache__", "turtledemo", "ensurepip", "pydoc_data"}
)
# Generated on the machine that built Python: a table of its compiler flags and folders.
_BUILD_DATA = "_sysconfigdata"
# A line that starts with a string or a number, perhaps inside brackets, is a row of a table.
_TABLE_ROW = re.compile(r"""^[ \t]*[\[({]*[ \t]*[rbu]?(?:'(?!'')|"(?!"")|-?\d)""", re.MULTILINE)
_TEXT_LINE = re.compile(r"^[ \t]*\S", re.MULTILINE)
_LOCAL_SUFFIXES = (".txt", ".py", ".md", ".json", ".jsonl")
_TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Document:
    """One text: `name` is a dotted module name, or a file (with its line or item)."""

    name: str
    text: str


def is_heldout(module: str) -> bool:
    """True where `module` (a dotted name) is a held-out module or lies in a held-out package."""
    return any(module == held or module.startswith(held + ".") for held in HELDOUT_MODULES)


def is_table(text: str) -> bool:
    """True where more than half of the lines that are not blank are rows of literals.

    This rule drops the character maps of `encodings`, `html.entities` and their like, which teach
    a model nothing but themselves.
    """
    return 2 * len(_TABLE_ROW.findall(text)) > len(_TEXT_LINE.findall(text))


def stdlib_documents(split: str = "all") -> list[Document]:
    """The running Python's standard library: one document a module, sorted by name.

    Tests, demonstrations, bundled packages, pure tables (`is_table`) and files that are not UTF-8
    are left out. `split` is "train", "heldout" or "all"; modules that this Python lacks are
    simply absent. Raises ValueError for another split, FileNotFoundError where the library's
    sources are not on disk.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        Document(name, text)
        for name, path in sorted(_module_files(root))
        if split == "all" or is_heldout(name) == (split == "heldout")
        if (text := _read_source(path)).strip() and not is_table(text)
    ]
    if not documents:
        raise FileNotFoundError(f"{root}: no standard library sources here (*.py expected)")
    return documents


def stdlib_source(module: str) -> str | None:
    """The source of one standard library module, or None where this Python has no such module."""
    base = Path(sysconfig.get_path("stdlib")).joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return _read_source(path)
    return None


def local_documents(path: str | Path) -> list[Document]:
    """Documents from a file, or from every file of a folder and its subfolders, in name order.

    .txt, .py and .md files are one document each; .json is a list of strings or rows; a .jsonl line
    is a row. A row is {"text": ...}, or holds a conversation under "conversations" or "messages",
    in which case the document is the row's own JSON (`conversations` and `templates` read it).

    Raises FileNotFoundError for a missing path or a folder without such files, and ValueError,
    naming file and line (or item), for content of another shape.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        return list(_file_documents(path))
    files = [file for file in sorted(path.rglob("*")) if file.suffix in _LOCAL_SUFFIXES]
    if not files:
        raise FileNotFoundError(f"{path}: no {', '.join(_LOCAL_SUFFIXES)} file in this folder")
    return [document for file in files for document in _file_documents(file)]


def pack_tokens(
    documents: Iterable[Document], tokenizer: Any, bos_id: int, eos_id: int
) -> np.ndarray:
    """One flat int32 stream of `[bos] ids [eos]` for each document, in order.

    `tokenizer` is a `tokenizers.Tokenizer` or a transformers fast tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    texts = [document.text for document in documents]
    pieces = []
    # In groups: an encoding carries far more than its ids, and a whole corpus of them is large.
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        group = texts[start : start + _TEXTS_AT_ONCE]
        for encoding in backend.encode_batch_fast(group, add_special_tokens=False):
            pieces.append(np.array([bos_id, *encoding.ids, eos_id], np.int32))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


def read_jsonl(path: Path) -> Iterator[tuple[int, str, dict]]:
    """Yields (line number, line, row) for each line that is not blank.

    Raises ValueError, naming file and line, for a line that is not a JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a JSON object expected, not {_kind(row)}")
        yield number, line, row


def read_text(path: Path) -> str:
    """A file's text with "\\n" line ends. Raises ValueError, naming the file, if not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _module_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of the library's modules.

    Folders that cannot be packages (site-packages, lib-dynload, config-3.11-...) fall out because
    their names are no identifiers.
    """
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name.isidentifier() and name not in _SKIPPED_FOLDERS
        ]
        package = Path(folder).relative_to(root).parts
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix == ".py" and not stem.startswith(_BUILD_DATA):
                parts = package if stem == "__init__" else (*package, stem)
                yield ".".join(parts), Path(folder, file)


def _read_source(path: Path) -> str:
    """The text of a library file; empty where it is not UTF-8 (a few old files are not)."""
    try:
        return read_text(path)
    except ValueError:
        return ""


def _file_documents(path: Path) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        yield from _jsonl_documents(path)
    elif path.suffix == ".json":
        yield from _json_documents(path)
    elif path.suffix in _LOCAL_SUFFIXES:
        yield Document(str(path), read_text(path))
    else:
        raise ValueError(f"{path}: one of {', '.join(_LOCAL_SUFFIXES)} expected")


def _json_documents(path: Path) -> Iterator[Document]:
    try:
        items = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(items, list):
        raise ValueError(f"{path}: a JSON list of strings or rows expected, not {_kind(items)}")
    for index, item in enumerate(items):
        name = f"{path}[{index}]"
        if isinstance(item, str):
            yield Document(name, item)
        elif isinstance(item, dict):
            yield _row_document(name, json.dumps(item, ensure_ascii=False), item)
        else:
            raise ValueError(f"{name}: a string or an object expected, not {_kind(item)}")


def _jsonl_documents(path: Path) -> Iterator[Document]:
    for number, line, row in read_jsonl(path):
        yield _row_document(f"{path}:{number}", line, row)


def _row_document(name: str, text: str, row: dict) -> Document:
    if isinstance(row.get("text"), str):
        return Document(name, row["text"])
    if any(isinstance(row.get(key), list) for key in ("conversations", "messages")):
        return Document(name, text)
    raise ValueError(
        f"{name}: 'text' (a string), 'conversations' or 'messages' (a list) expected,"
        f" found {sorted(row)}"
    )


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(
        type(value), type(value).__name__
    )
