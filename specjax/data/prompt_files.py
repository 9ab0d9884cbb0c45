"""A prompt, and prompts in JSON-lines files: Spec-Bench's, EAGLE's and GSM8K's rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specjax.data.corpora import read_jsonl

QUESTION_FILE = "question.jsonl"
_EXPECTED = "a row needs 'turns' (a list of strings), or 'question' and 'answer' (GSM8K)"


@dataclass(frozen=True)
class Prompt:
    """One question of one or more user turns; `reference` is a known answer, if there is one."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    reference: str | None = None


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts (None: all) of a .jsonl file, or of a folder's question.jsonl.

    A row is {"question_id", "category", "turns", "reference"}, the last optional, or GSM8K's
    {"question", "answer"}; question_id defaults to the row's index. Raises FileNotFoundError for a
    missing file and ValueError, naming file, line and field, for a file without prompts, a line
    that is not JSON, a row without turns, a turn that is no text, or a question_id used twice.
    """
    path = Path(path)
    file = path / QUESTION_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such prompt file (JSON lines; {_EXPECTED})")
    prompts: list[Prompt] = []
    for prompt in _file_prompts(file):
        if len(prompts) == limit:
            break
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{file}: empty, no prompts; {_EXPECTED}")
    return prompts


def _file_prompts(file: Path) -> Iterator[Prompt]:
    lines: dict[int | str, int] = {}
    for index, (number, _, row) in enumerate(read_jsonl(file)):
        prompt = _row_prompt(row, index, f"{file}:{number}")
        first = lines.setdefault(prompt.question_id, number)
        if first != number:  # answers are paired by it
            raise ValueError(
                f"{file}:{number}: question_id: {prompt.question_id!r} is line {first}'s already"
            )
        yield prompt


def _row_prompt(row: dict, index: int, where: str) -> Prompt:
    if "turns" not in row and "question" in row:
        row = {"category": "math", "reference": row.get("answer"), "turns": [row["question"]]} | row
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: no turns; {_EXPECTED}, found {sorted(row)}")
    for turn, text in enumerate(turns):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: turns[{turn}]: {text!r} is no prompt, a text expected")
    question_id = row.get("question_id", index)
    if not isinstance(question_id, int | str):
        raise ValueError(f"{where}: question_id: {question_id!r}, a number or a string expected")
    return Prompt(
        question_id=question_id,
        category=str(row.get("category", "")),
        turns=tuple(turns),
        reference=_reference(row.get("reference")),
    )


def _reference(value: Any) -> str | None:
    """One text: the files hold a string, a list with one string a turn, or lists in that list."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(part for item in value if (part := _reference(item)) is not None)
    return str(value)
