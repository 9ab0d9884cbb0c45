"""Answer files in Spec-Bench's format, and comparing two of them.

One JSON object a line, one line a question, the tasks of a run in its order and each sorted by
question_id, so that Spec-Bench's own scripts read them. Where its format leaves a choice:

- `question_id` is the prompt file's. Where two tasks use the same one, all are "task/id".
- `new_tokens` counts the tokens up to the stop token, the same counter for every method.
- `accept_lengths` runs over the turns without the prefill's entry, for prefill verifies nothing:
  Spec-Bench's "mean accepted tokens" then equals tau in results.json, the list has as many entries
  as `decoding_steps` sums to, and adds up to the new tokens less one per turn.
- `wall_time` is the median repeat in seconds: prefill inside, compiling outside.
- `tokens`, one list of token ids per turn, is added beside Spec-Bench's keys: two texts can be
  equal where the tokens are not. Readers of the format ignore further keys.

Both comparing functions have two modes. "spec_bench" does what Spec-Bench's scripts do, for
numbers that compare with its leaderboard; "strict" does what one would expect of them.
"""

import base64
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from specjax.evaluation.records import MethodRun, TurnRecord
from specjax.files import write_text

PER_TURN = ("turns", "decoding_steps", "new_tokens", "wall_time")
"""The keys of a choice that hold one entry per turn."""

MODES = ("strict", "spec_bench")


@dataclass(frozen=True)
class Difference:
    """Where two answer files part: `turn` and `position` are None where they do not apply.

    `position` counts tokens where both files have token ids, and characters otherwise.
    """

    question_id: int | str
    reason: str
    turn: int | None = None
    position: int | None = None

    def __str__(self) -> str:
        place = "" if self.turn is None else f", turn {self.turn}"
        place += "" if self.position is None else f", position {self.position}"
        return f"question {self.question_id}{place}: {self.reason}"


@dataclass(frozen=True)
class Comparison:
    """`checked` questions were in both files; `differences` holds the first one of each."""

    checked: int
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return not self.differences


class Speed(NamedTuple):
    """Tokens per second of the method and of the baseline, their ratio, and mean tokens a round."""

    tokens_per_s: float
    baseline_tokens_per_s: float
    speedup: float
    mean_accepted_tokens: float


def answers_name(method: str, temperature: float) -> str:
    """The file's name: "fasteagle/best" at 0 is "fasteagle-best-temp-0.0.jsonl"."""
    return f"{method.replace('/', '-')}-temp-{float(temperature)}.jsonl"


def write_answers(
    path: str | os.PathLike,
    runs: Sequence[MethodRun],
    model_id: str,
    timestamp: float | None = None,
) -> None:
    """Write the answers of one method's runs, a task each, atomically.

    `timestamp` is in seconds, the present by default. Raises OSError, naming the file, when it
    cannot be written.
    """
    timestamp = time.time() if timestamp is None else timestamp
    ids = [key for run in runs for key in {turn.question_id for turn in run.turns}]
    rows = []
    for run in runs:
        questions: dict = {}
        for turn in sorted(run.turns, key=lambda turn: turn.turn):
            questions.setdefault(turn.question_id, []).append(turn)
        for key in _sorted_ids(questions):
            unique = key if len(set(ids)) == len(ids) else f"{run.task}/{key}"
            rows.append(_answer_row(unique, questions[key], model_id, timestamp))
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_answers(path: str | os.PathLike) -> list[dict]:
    """The rows of an answer file, Spec-Bench's own or ours.

    Raises OSError when it cannot be read, and ValueError starting with file:line for a line that is
    not JSON, lacks a key, repeats a question, or has lists that do not fit together.
    """
    rows, seen = [], {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check_answer(row)
            if row["question_id"] in seen:
                first = seen[row["question_id"]]
                raise ValueError(f"question_id {row['question_id']} is in line {first} too")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        seen[row["question_id"]] = number
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no answers")
    return rows


def compare_answers(a: Sequence[dict], b: Sequence[dict], mode: str = "strict") -> Comparison:
    """Whether two sets of rows hold the same answers.

    "strict" wants the same questions, the same number of turns, the same lengths and the same
    tokens (texts where a file has no tokens). "spec_bench" repeats what Spec-Bench's equal.py
    does: it compares texts line by line up to the shorter file's end, and looks at no id. Raises
    ValueError for another mode.
    """
    _check_mode(mode)
    if mode == "spec_bench":
        pairs = list(zip(a, b, strict=False))
        parted = [row_a for row_a, row_b in pairs if _texts(row_a) != _texts(row_b)]
        differences = [Difference(row["question_id"], "texts differ") for row in parted]
        return Comparison(len(pairs), tuple(differences))
    in_a, in_b = ({row["question_id"]: row for row in rows} for rows in (a, b))
    both = [key for key in _sorted_ids(in_a) if key in in_b]
    found = [_first_difference(in_a[key], in_b[key]) for key in both]
    found += [Difference(key, "only in the first") for key in _sorted_ids(in_a.keys() - in_b)]
    found += [Difference(key, "only in the second") for key in _sorted_ids(in_b.keys() - in_a)]
    return Comparison(len(both), tuple(difference for difference in found if difference))


def speed(a: Sequence[dict], b: Sequence[dict], mode: str = "strict") -> Speed:
    """How fast the method `a` is against the baseline `b`.

    "strict" divides all tokens by all seconds and wants the same questions in both (ValueError).
    "spec_bench" takes the mean of the questions' own speeds and asks for nothing; unlike
    Spec-Bench's speed.py it counts the baseline's tokens as logged, where that script tokenises its
    text again and subtracts one a turn. Raises ValueError for another mode.
    """
    _check_mode(mode)
    if mode == "strict":
        ids_a, ids_b = ({row["question_id"] for row in rows} for rows in (a, b))
        if ids_a != ids_b:
            raise ValueError(f"questions in one file only: {_sorted_ids(ids_a ^ ids_b)[:5]}")
    rate = _total_rate if mode == "strict" else _mean_rate
    ours, base = rate(a), rate(b)
    accepted = [length for row in a for length in row["choices"][0]["accept_lengths"]]
    return Speed(ours, base, ours / base, float(np.mean(accepted)) if accepted else 1.0)


def _answer_row(key: int | str, turns: list[TurnRecord], model_id: str, timestamp: float) -> dict:
    texts = [turn.text for turn in turns]
    return {
        "question_id": key,
        "category": turns[0].category,
        "answer_id": _answer_id(model_id, key, texts),
        "model_id": model_id,
        "choices": [
            {
                "index": 0,
                "turns": texts,
                "decoding_steps": [len(turn.accept_lengths) - 1 for turn in turns],
                "new_tokens": [len(turn.tokens) for turn in turns],
                "wall_time": [float(np.median(turn.wall_times)) for turn in turns],
                "accept_lengths": [int(n) for turn in turns for n in turn.accept_lengths[1:]],
                "tokens": [[int(token) for token in turn.tokens] for turn in turns],
            }
        ],
        "tstamp": timestamp,
    }


def _answer_id(*parts) -> str:
    """22 characters that depend on nothing but the answer, so that a rerun writes the same."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _check_answer(row) -> None:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for key in ("question_id", "category", "choices"):
        if key not in row:
            raise ValueError(f"lacks {key}")
    if not isinstance(row["question_id"], int | str):
        raise ValueError("question_id is neither a number nor a string")
    if not isinstance(row["choices"], list) or not row["choices"]:
        raise ValueError("choices is empty or no list")
    choice = row["choices"][0]
    for key in (*PER_TURN, "accept_lengths"):
        if not isinstance(choice, dict) or not isinstance(choice.get(key), list):
            raise ValueError(f"choices[0] lacks the list {key}")
    for key in PER_TURN:
        if len(choice[key]) != len(choice["turns"]):
            raise ValueError(f"{len(choice['turns'])} turns, but {len(choice[key])} {key}")
    if not all(isinstance(t, int | float) and t > 0 for t in choice["wall_time"]):
        raise ValueError(f"wall_time is not positive: {choice['wall_time']}")


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, not one of {MODES}")


def _first_difference(row_a: dict, row_b: dict) -> Difference | None:
    choice_a, choice_b = row_a["choices"][0], row_b["choices"][0]
    question = row_a["question_id"]
    if len(choice_a["turns"]) != len(choice_b["turns"]):
        counts = f"{len(choice_a['turns'])} and {len(choice_b['turns'])} turns"
        return Difference(question, counts)
    key = "tokens" if "tokens" in choice_a and "tokens" in choice_b else "turns"
    lengths = zip(choice_a["new_tokens"], choice_b["new_tokens"], strict=True)
    answers = zip(choice_a[key], choice_b[key], strict=True)
    for turn, ((length_a, length_b), (a, b)) in enumerate(zip(lengths, answers, strict=True)):
        if length_a != length_b:
            reason = f"{length_a} and {length_b} new tokens"
            return Difference(question, reason, turn, _first_position(a, b))
        if a != b:
            return Difference(question, f"{key} differ", turn, _first_position(a, b))
    return None


def _first_position(a: Sequence, b: Sequence) -> int | None:
    """The first index at which `a` and `b` differ, one of them having ended included."""
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return None if len(a) == len(b) else min(len(a), len(b))


def _texts(row: dict) -> list[str]:
    return row["choices"][0]["turns"]


def _sorted_ids(ids) -> list:
    """Numbers in order, then strings in order: prompt sets use either."""
    return sorted(ids, key=lambda key: (isinstance(key, str), key))


def _tokens_and_seconds(row: dict) -> tuple[int, float]:
    return sum(row["choices"][0]["new_tokens"]), sum(row["choices"][0]["wall_time"])


def _total_rate(rows: Sequence[dict]) -> float:
    tokens, seconds = zip(*map(_tokens_and_seconds, rows), strict=True)
    return sum(tokens) / sum(seconds)


def _mean_rate(rows: Sequence[dict]) -> float:
    rates = [tokens / seconds for tokens, seconds in map(_tokens_and_seconds, rows)]
    return sum(rates) / len(rates)
