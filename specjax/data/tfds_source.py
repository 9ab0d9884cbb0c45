"""tensorflow-datasets as rows to read by index, without TensorFlow.

    tfds:NAME[/CONFIG][:VERSION]/SPLIT?field=FIELD[&reference=FIELD]

`field` holds a conversation (a sequence of messages, or its JSON) or a text, then one user turn
whose known answer is `reference`. Data sets are read as array_record files, prepared in that format
where they are not on disk yet.
"""

import functools
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from specjax import processes

PREFIX = "tfds:"
SYNTAX = "tfds:NAME/SPLIT?field=FIELD[&reference=FIELD]"


@dataclass(frozen=True)
class TfdsName:
    """What a "tfds:..." string asks for; `reference` is "" where there is none."""

    dataset: str
    split: str
    field: str
    reference: str = ""

    @classmethod
    def of(cls, text: str) -> "TfdsName":
        """Raises ValueError, with the syntax, for another string."""
        path, _, query = text.removeprefix(PREFIX).partition("?")
        dataset, _, split = path.rpartition("/")
        options = dict(parse_qsl(query, keep_blank_values=True))
        unknown = sorted(options.keys() - {"field", "reference"})
        if not (dataset and split and options.get("field")) or unknown:
            raise ValueError(f"{text!r}: {SYNTAX} expected")
        return cls(dataset, split, **options)


def is_tfds(name: Any) -> bool:
    """Whether a data set of this kind is asked for."""
    return str(name).startswith(PREFIX)


def tfds_rows(name: str, split: str, data_dir: str | Path | None, module: str | None = None) -> Any:
    """The split as a random-access source of dicts.

    Args:
      data_dir: None is tensorflow-datasets' own folder.
      module: to import first, where the builder is not in the registry.

    Raises:
      ImportError: tensorflow-datasets is not here.
      FileNotFoundError: the data set is not on disk and cannot be prepared there.
      ValueError: it is there in another format, or has no such split.
    """
    prepared = functools.partial(_prepared, name, data_dir, module)
    # Several processes must not prepare one folder at once: the others find it there, or have
    # folders of their own.
    processes.first(lambda: prepared() and None)
    builder = prepared()
    splits = tuple(builder.info.splits)
    if split.partition("[")[0] not in splits:
        raise ValueError(f"tfds:{name}: split {split!r} is none of {', '.join(splits)}")
    try:
        return builder.as_data_source(split=split)
    except Exception as error:
        raise ValueError(
            f"tfds:{name}: {builder.data_dir} cannot be read without TensorFlow; array_record files"
            f" expected, made by download_and_prepare(file_format='array_record') ({error})"
        ) from error


def _prepared(name: str, data_dir: str | Path | None, module: str | None) -> Any:
    """tensorflow-datasets' object for a data set, whose files are written where they are not yet.

    Raises ImportError and FileNotFoundError as `tfds_rows`.
    """
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        if module:
            importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"tfds:{name}: tensorflow-datasets with importlib_resources needed ({error})"
        ) from error
    try:
        builder = tfds.builder(name, data_dir=None if data_dir is None else str(data_dir))
    except Exception as error:  # unknown names, configs and versions raise kinds of their own
        raise FileNotFoundError(
            f"tfds:{name}: no such data set in {data_dir or 'the default folder'} or in the "
            f"registry ({str(error).strip().splitlines()[0]})"
        ) from error
    if not builder.is_prepared():
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:
            raise FileNotFoundError(
                f"tfds:{name}: not in {builder.data_dir}, and preparing it there failed: {error}"
            ) from error
    return builder


def tfds_conversations(text: str, data_dir: str | Path | None) -> Iterator[tuple[str, dict]]:
    """(where, {"messages": [...]}) of every row that a "tfds:..." string asks for, unchecked."""
    name = TfdsName.of(text)
    rows = tfds_rows(name.dataset, name.split, data_dir)
    for index in range(len(rows)):
        where, row = f"tfds:{name.dataset}/{name.split}[{index}]", rows[index]
        messages = conversation_of(field(row, name.field, where))
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
            if name.reference:
                answer = plain(field(row, name.reference, where))
                messages.append({"role": "assistant", "content": answer})
        yield where, {"messages": messages}


def field(row: dict, name: str, where: str) -> Any:
    """Raises ValueError, naming the fields there are, for one that is not."""
    if name not in row:
        raise ValueError(f"{where}: no field {name!r}, it has {', '.join(sorted(row))}")
    return row[name]


def conversation_of(value: Any) -> Any:
    """A feature as a list of messages, where it is one or its JSON; else as plain values."""
    value = plain(value)
    if isinstance(value, dict):  # a sequence of dicts comes as a dict of sequences
        return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            return value
        if isinstance(parsed, dict):
            parsed = parsed.get("messages", parsed.get("conversations"))
        return parsed if isinstance(parsed, list) else value
    return value


def plain(value: Any) -> Any:
    """Features as Python values: texts come as bytes, sequences as arrays."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0):
        return [plain(part) for part in value]
    return value.item() if hasattr(value, "item") else value
