"""What one benchmark run of one method leaves behind: the input of every statistic and report."""

import math
from dataclasses import asdict, dataclass

VANILLA = "vanilla"
"""The method name of plain autoregressive decoding, the baseline of every comparison."""


@dataclass(frozen=True)
class TurnRecord:
    """One answer to one turn of one question.

    question_id:    the prompt's id; all turns of a question share it
    category:       the prompt set's own label ("writing", "math_reasoning", ...)
    turn:           0 for the first turn
    tokens:         new tokens, cut at the stop token (kept) or the length limit
    text:           the same, as text
    accept_lengths: tokens emitted by prefill (always 1), then by each round, the extra token
                    included, after the cut; sums to len(tokens)
    wall_times:     seconds, one per timed repeat; prefill included, compiling excluded. A turn
                    decoded in a batch carries the batch's time divided by its rows.

    Raises ValueError, naming question and turn, when these do not fit together.
    """

    question_id: int | str
    category: str
    turn: int
    tokens: tuple[int, ...]
    text: str
    accept_lengths: tuple[int, ...]
    wall_times: tuple[float, ...]

    def __post_init__(self):
        where = f"question {self.question_id}, turn {self.turn}"
        if not self.accept_lengths or self.accept_lengths[0] != 1:
            raise ValueError(f"{where}: accept_lengths must start with the prefill's one token")
        if min(self.accept_lengths) < 1:
            raise ValueError(f"{where}: accept_lengths has a round that emitted nothing")
        if sum(self.accept_lengths) != len(self.tokens):
            raise ValueError(
                f"{where}: accept_lengths sums to {sum(self.accept_lengths)}, "
                f"but there are {len(self.tokens)} tokens"
            )
        if not self.wall_times or not all(0 < t < math.inf for t in self.wall_times):
            raise ValueError(f"{where}: wall_times must be positive seconds: {self.wall_times}")


@dataclass(frozen=True)
class MethodRun:
    """All answers of one method in one setting, and what the method costs.

    method:             "vanilla", "eagle3", "fasteagle", "fasteagle/best", ...
    task, temperature, seed, batch: the setting; vanilla runs in the same one
    rule, exact:        verification rule, and whether it keeps the target's law
    nodes, depth:       draft tree rows per round (root included), and its deepest draft token;
                        1 and 0 for vanilla
    turns:              the answers
    draft_ms, verify_ms, round_ms: median milliseconds of one draft, one verification, one round
    draft_flops, verify_flops: operations of one draft and of one target forward over its tree
    drafter_parameters: count; train_tokens, train_seconds: what training the drafter took
    lossless:           the losslessness verdict as it stands in results.json

    Raises ValueError for no turns, a turn given twice, or a round that emitted more tokens than
    `depth` draft tokens and the extra one.
    """

    method: str
    task: str
    temperature: float
    seed: int
    batch: int
    rule: str
    exact: bool
    nodes: int
    depth: int
    turns: list[TurnRecord]
    draft_ms: float
    verify_ms: float
    round_ms: float
    drafter_parameters: int
    train_tokens: int
    train_seconds: float
    lossless: dict
    draft_flops: float = 0.0
    verify_flops: float = 0.0

    def __post_init__(self):
        if not self.turns:
            raise ValueError(f"{self.name}: no turns")
        seen = set()
        for turn in self.turns:
            where = f"{self.name}: question {turn.question_id}, turn {turn.turn}"
            if (turn.question_id, turn.turn) in seen:
                raise ValueError(f"{where} is given twice")
            if max(turn.accept_lengths) > self.depth + 1:
                raise ValueError(
                    f"{where}: a round emitted {max(turn.accept_lengths)} tokens, "
                    f"more than depth {self.depth} allows"
                )
            seen.add((turn.question_id, turn.turn))

    def to_json(self) -> dict:
        """Its fields, to be read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "MethodRun":
        """The run whose `to_json` was written as JSON."""
        lists = ("tokens", "accept_lengths", "wall_times")
        tupled = [turn | {key: tuple(turn[key]) for key in lists} for turn in fields["turns"]]
        return cls(**fields | {"turns": [TurnRecord(**turn) for turn in tupled]})

    @property
    def is_vanilla(self) -> bool:
        """Whether this is the baseline itself."""
        return self.method == VANILLA

    @property
    def name(self) -> str:
        """Method and setting in words, for messages."""
        return f"{self.method}, {self.task}, T={self.temperature:g}"
