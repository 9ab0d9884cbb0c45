"""Prompt sets by name: held-out library code, local files, tensorflow-datasets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specjax.data.corpora import local_documents
from specjax.data.prompt_files import QUESTION_FILE, Prompt, read_prompts
from specjax.data.stdlib_prompts import STDLIB_PROMPTS, stdlib_prompts, stdlib_training_prompts
from specjax.data.templates import first_question, raw_messages
from specjax.data.tfds_source import TfdsName, plain, tfds_conversations, tfds_rows

__all__ = [
    "CONVERSATION_SETS",
    "LOCAL_SETS",
    "STDLIB_PROMPTS",
    "TFDS_SETS",
    "Prompt",
    "load_prompts",
    "prompt_set_names",
    "stdlib_training_prompts",
]

DEFAULT_TRAINING_PROMPTS = 200

# Name -> the folders that may hold it under data_dir, each with a question.jsonl.
LOCAL_SETS: dict[str, tuple[str, ...]] = {
    "mt_bench": ("mt_bench", "eagle/mt_bench"),
    "humaneval": ("humaneval", "eagle/humaneval"),
    "gsm8k": ("gsm8k", "eagle/gsm8k"),
    "alpaca": ("alpaca", "eagle/alpaca"),
    "sum": ("sum", "eagle/sum", "cnn_dm"),
    "cnn_dm": ("cnn_dm", "sum", "eagle/sum"),
    "qa": ("qa", "eagle/qa"),
    "spec_bench": ("spec_bench",),
}

# Folders under data_dir whose .json and .jsonl files hold conversations.
CONVERSATION_SETS = ("sharegpt", "ultrachat")


@dataclass(frozen=True)
class _TfdsSet:
    module: str  # imported by name: the registry of 4.9.10 does not find it otherwise
    category: str
    turn: Callable[[dict[str, str]], str]
    reference: str


TFDS_SETS: dict[str, _TfdsSet] = {
    "gsm8k": _TfdsSet(
        module="tensorflow_datasets.text.gsm8k.gsm8k",
        category="math",
        turn=lambda row: row["question"],
        reference="answer",
    ),
    "cnn_dailymail": _TfdsSet(
        module="tensorflow_datasets.summarization.cnn_dailymail",
        category="summarization",
        turn=lambda row: "Summarize: " + row["article"],
        reference="highlights",
    ),
}


def prompt_set_names() -> tuple[str, ...]:
    """Every name that `load_prompts` knows, besides paths."""
    tfds = (f"tfds:{name}" for name in TFDS_SETS)
    return ("stdlib", "stdlib-train", *LOCAL_SETS, *CONVERSATION_SETS, *tfds)


def load_prompts(
    name: str | Path, limit: int | None = None, data_dir: str | Path | None = None
) -> list[Prompt]:
    """The first `limit` prompts (None: all) of a set.

    `name` is one of
    - "stdlib": code of the held-out modules of the running Python (`STDLIB_PROMPTS`);
    - "stdlib-train": code of its other modules (None: 200 of them);
    - "mt_bench", "humaneval", "gsm8k", "alpaca", "sum" or "cnn_dm", "qa", "spec_bench": folders
      with a question.jsonl under `data_dir`, or under its folder `eagle`;
    - "sharegpt", "ultrachat": the first question of each conversation in the .json and .jsonl files
      of that folder under `data_dir` (`corpora.local_documents`);
    - "tfds:gsm8k", "tfds:cnn_dailymail": the test split from tensorflow-datasets, `data_dir` being
      its folder (None: its default), prepared there as array_record files if it is not yet;
    - "tfds:NAME/SPLIT?field=...": the user's turns of any other data set (`tfds_source`);
    - a path to a .jsonl file, or to a folder with a question.jsonl.

    Raises ValueError for an unknown name or a bad limit, FileNotFoundError for a missing file or
    data_dir, and `read_prompts`' errors for bad files.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit}, at least 1 or None expected")
    name = str(name)
    if name == "stdlib":
        return stdlib_prompts()[:limit]
    if name == "stdlib-train":
        return stdlib_training_prompts(limit or DEFAULT_TRAINING_PROMPTS)
    if name.startswith("tfds:"):
        return _tfds_prompts(name.removeprefix("tfds:"), limit, data_dir)
    if name in CONVERSATION_SETS:
        return _conversation_prompts(_data_dir(name, data_dir) / name, limit)
    if name in LOCAL_SETS:
        return read_prompts(_local_set(name, data_dir), limit)
    if Path(name).exists() or Path(name).suffix or len(Path(name).parts) > 1:
        return read_prompts(name, limit)
    raise _unknown(name)


def _data_dir(name: str, data_dir: str | Path | None) -> Path:
    if data_dir is None:
        raise ValueError(f"data_dir: prompt set {name!r} needs the folder that holds its files")
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data_dir: {data_dir}: no such folder")
    return Path(data_dir)


def _conversation_prompts(folder: Path, limit: int | None) -> list[Prompt]:
    prompts: list[Prompt] = []
    for document in local_documents(folder):
        if len(prompts) == limit:
            break
        try:
            question = first_question(document.text)
        except ValueError as error:
            raise ValueError(f"{document.name}: {error}") from error
        if question is not None:
            prompts.append(Prompt(document.name, "conversation", (question,)))
    if not prompts:
        raise ValueError(f"{folder}: no conversation in which a user asks anything")
    return prompts


def _local_set(name: str, data_dir: str | Path | None) -> Path:
    data_dir = _data_dir(name, data_dir)
    files = [data_dir / folder / QUESTION_FILE for folder in LOCAL_SETS[name]]
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(f"prompt set {name!r}: none of {', '.join(map(str, files))} exists")


def _tfds_prompts(name: str, limit: int | None, data_dir: str | Path | None) -> list[Prompt]:
    if "/" in name or "?" in name:
        return _any_tfds_prompts(f"tfds:{name}", limit, data_dir)
    if name not in TFDS_SETS:
        raise _unknown(f"tfds:{name}")
    source = TFDS_SETS[name]
    rows = tfds_rows(name, "test", data_dir, source.module)
    prompts = []
    for index in range(min(len(rows), limit or len(rows))):
        row = plain(rows[index])
        prompts.append(Prompt(index, source.category, (source.turn(row),), row[source.reference]))
    if not prompts:
        raise ValueError(f"tfds:{name}: its test split holds no prompts")
    return prompts


def _any_tfds_prompts(name: str, limit: int | None, data_dir: str | Path | None) -> list[Prompt]:
    """The user's turns of any data set's rows; rows without one are left out."""
    dataset = TfdsName.of(name).dataset
    prompts: list[Prompt] = []
    for index, (where, row) in enumerate(tfds_conversations(name, data_dir)):
        if len(prompts) == limit:
            break
        try:
            messages = raw_messages(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        turns = tuple(m["content"] for m in messages if m["role"] == "user")
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if turns:
            prompts.append(Prompt(index, dataset, turns, answers[0] if answers else None))
    if not prompts:
        raise ValueError(f"{name}: no row in which a user asks anything")
    return prompts


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"{name!r} is no prompt set: {', '.join(prompt_set_names())}, or the path of a .jsonl file"
    )
