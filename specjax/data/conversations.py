"""Conversations of several turns from files: ShareGPT's and UltraChat's rows, and array_record's.

A row is {"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}; speakers'
names are normalised and system turns kept. Crawled conversations often begin in the middle: answers
before the first question are left out.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specjax.data.templates import Message, check_messages, raw_messages
from specjax.data.tfds_source import is_tfds, tfds_conversations

SUFFIXES = (".jsonl", ".json", ".array_record")


@dataclass(frozen=True)
class Conversation:
    """`name` says where it was read: file and line, or record."""

    name: str
    messages: tuple[Message, ...]


def read_conversations(
    path: str | Path, limit: int = 0, skip_damaged: bool = False, data_dir: str | None = None
) -> tuple[list[Conversation], list[str]]:
    """(the first `limit` conversations, 0 = all; what was wrong with each row skipped).

    Args:
      path: a .jsonl, .json (a list) or .array_record file (a JSON object a record), a folder of
        them, read in the order of names, or "tfds:NAME/SPLIT?field=..." (`tfds_source`).
      skip_damaged: whether rows that are no conversation are left out, or else refused.
      data_dir: of tensorflow-datasets.

    Raises:
      FileNotFoundError: no such file, or a folder without any.
      ValueError: a damaged row (names file and line), or no conversation at all.
    """
    found: list[Conversation] = []
    skipped: list[str] = []
    for name, row in _rows(path, data_dir):
        if limit and len(found) == limit:
            break
        try:
            found.append(Conversation(name, tuple(_messages(row))))
        except ValueError as error:
            if not skip_damaged:
                raise ValueError(f"{name}: {error} (data.skip_damaged leaves it out)") from error
            skipped.append(f"{name}: {error}")
    if not found:
        raise ValueError(
            f"{path}: no conversations ({len(skipped)} damaged rows); rows with 'messages' or "
            "'conversations' expected"
        )
    return found, skipped


def _messages(row: bytes | dict) -> list[Message]:
    if isinstance(row, bytes):
        try:
            row = row.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text ({error})") from error
    messages = raw_messages(row)
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), 0)
    asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), first)
    if all(m["role"] == "assistant" for m in messages[first:asked]):
        messages = messages[:first] + messages[asked:]
    check_messages(messages)
    for index, message in enumerate(messages):
        if message["role"] != "system" and not message["content"].strip():
            raise ValueError(f"messages[{index}].content: empty")
    return messages


def _rows(path: str | Path, data_dir: str | None) -> Iterator[tuple[str, bytes | dict]]:
    """(where, a JSON line or its object) of every row, none of them checked."""
    if is_tfds(path):
        yield from tfds_conversations(str(path), data_dir)
        return
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data.conversations: {path}: no such file or folder")
    files = [path] if path.is_file() else _files(path)
    for file in files:
        if file.suffix == ".jsonl":
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{file}:{number}", line
        elif file.suffix == ".json":
            yield from _json_rows(file)
        elif _is_array_record(file):
            yield from _array_records(file)
        else:
            raise ValueError(f"data.conversations: {file}: one of {', '.join(SUFFIXES)} expected")


def _files(folder: Path) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and (file.suffix in SUFFIXES or _is_array_record(file))
    ]
    if not files:
        raise FileNotFoundError(
            f"data.conversations: {folder}: no {', '.join(SUFFIXES)} file in this folder"
        )
    return files


def _is_array_record(file: Path) -> bool:
    """Also shards: name.array_record-00000-of-00008."""
    return ".array_record" in file.name


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(items, list):
        raise ValueError(f"{file}: a JSON list of conversations expected")
    for index, item in enumerate(items):
        yield f"{file}[{index}]", item if isinstance(item, dict) else {}


def _array_records(file: Path) -> Iterator[tuple[str, bytes]]:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise ImportError(
            f"{file}: the array_record package is needed, pip install 'specjax[array_record]'"
        ) from error
    try:
        reader = ArrayRecordReader(str(file))
        if not reader.ok():
            raise ValueError("a damaged header")
        count = reader.num_records()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: not an array_record file ({error})") from error
    try:
        for index in range(count):
            yield f"{file}[{index}]", reader.read([index])[0]
    finally:
        reader.close()
