"""One sequence, round by round, and the conversation that goes on from it.

    conversation = Conversation(target, drafter)
    for pieces in conversation.ask(ids, max_new_tokens=128):
        print("".join(text for text, depth in pieces), end="", flush=True)

A conversation keeps its caches: the next `ask` gives the whole text so far and runs only what has
been added. Its cache is sized once and prompts are padded to buckets, so that turns compile
nothing new inside a bucket.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from specjax import decoding
from specjax.generation import (
    bucket,
    cache_slots,
    encode_prompts,
    make_engine,
    overlap,
    resume,
    room,
    start,
)
from specjax.models.target import Target
from specjax.sampling import GREEDY, Sampling
from specjax.trained import TrainedDrafter
from specjax.verification import Rule

Piece = tuple[str, int]
"""Text, and the draft depth that proposed it: 0 is the target's own."""

_UNFINISHED = "\ufffd"
_LONGEST = 4  # tokens of a character, at most: its bytes


class Detokenizer:
    """Text of tokens as they come; joined, it is the text of all of them.

    A token's text depends on its neighbours: a character may take several tokens, and some
    tokenizers drop the space before a text's first word. So it is the difference between two
    decodings of the last few tokens, and it is held back while it ends inside a character.
    Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()):
        """`context`: the tokens that the text continues."""
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        # One character before the text decides how it begins; bytes of a torn one would not do.
        tails = (list(context[-n:]) for n in range(1, min(_LONGEST, len(context)) + 1))
        self._ids = next((ids for ids in tails if _UNFINISHED not in self._text(ids)), [])
        self._read = len(self._ids)  # of these, how many are told

    def _text(self, ids) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""

    def _told(self) -> str:
        text = self._text(self._ids)[len(self._text(self._ids[: self._read])) :]
        self._ids = self._ids[self._read :]  # the next text's neighbours
        self._read = len(self._ids)
        return text

    def feed(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        if token in self._special:
            text = self.flush()
            self._ids, self._read = [token], 1
            return text
        self._ids.append(token)
        return "" if self._text(self._ids).endswith(_UNFINISHED) else self._told()

    def flush(self) -> str:
        """What was held back, with U+FFFD for characters that never came to an end."""
        return self._told() if self._read < len(self._ids) else ""


@functools.partial(jax.jit, static_argnums=1)
def _newest(state: decoding.DecodeState, count: int):
    """(the last `count` committed tokens, how many there are in all, done) of the one sequence."""
    places = state.lengths_B[0] - count + jnp.arange(count)
    return state.tokens_BxS[0, jnp.maximum(places, 0)], state.lengths_B[0], state.done_B[0]


class Answer:
    """An answer in the making: an iterator over its rounds, the prefill first.

    Each step decodes one round and returns its pieces; where nobody steps, nothing is decoded.
    Where an answer is cut inside a round, that round's last token counts as the target's own.
    """

    def __init__(self, conversation: "Conversation", ids: Sequence[int], max_new_tokens: int):
        self.prompt = list(ids)
        self.request = conversation.turns
        self.tokens: list[int] = []
        self.pieces: list[Piece] = []
        self.accept_lengths: list[int] = []  # as `generate` counts them
        self.seconds = 0.0  # in prefill and rounds; compiling and the caller's own time left out
        self.prefilled = 0  # tokens that the prefill ran
        self.ended = False  # whether a stop token or the length limit has been reached
        self.limit = min(int(max_new_tokens), conversation.room - len(ids))
        self._conversation = conversation
        self._words = Detokenizer(conversation.target.tokenizer, ids)

    def __iter__(self) -> Iterator[list[Piece]]:
        return self

    def __next__(self) -> list[Piece]:
        if self.ended or self._conversation.answer is not self:
            raise StopIteration
        started = time.perf_counter()
        tokens, self.ended = self._conversation._advance(self)
        self.seconds += time.perf_counter() - started
        texts = [self._words.feed(token) for token in tokens]
        if self.ended:
            texts[-1] += self._words.flush()
        depths = [*range(1, len(tokens)), 0]
        pieces = [piece for piece in zip(texts, depths, strict=True) if piece[0]]
        self.tokens += tokens
        self.accept_lengths.append(len(tokens))
        self.pieces += pieces
        return pieces

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(text for text, _ in self.pieces)

    @property
    def stopped(self) -> bool:
        """Whether it ended with a stop token."""
        return bool(self.tokens) and self.tokens[-1] in self._conversation.engine.stop_tokens


class Conversation:
    """A target, a drafter (None: plain decoding) and the decoded text that they share.

    Attributes:
      answer: the newest answer; earlier ones do not go on.
      room: most tokens of a conversation, the answer to come included.
      turns: answers begun, which number the requests' noise.
    """

    def __init__(
        self,
        target: Target,
        drafter: TrainedDrafter | None = None,
        sampling: Sampling = GREEDY,
        rule: str | Rule | None = None,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        capacity: int = 1024,
        slots: int = 0,
    ):
        """Sizes the cache for `capacity` tokens, of `slots` at least.

        Raises:
          ValueError: as `make_engine`; a target without a tokenizer.
        """
        if target.tokenizer is None:
            raise ValueError(f"{target.name} has no tokenizer: there is no text to stream")
        self.target, self.drafter, self.seed = target, drafter, seed
        self.engine, self.params = make_engine(target, drafter, sampling, stop_tokens, rule)
        capacity = min(capacity, target.config.max_position_embeddings)
        self.slots = max(cache_slots(self.engine, capacity, 0), slots)
        self.room = min(room(self.engine, self.slots), capacity)
        self.answer: Answer | None = None
        self.turns = 0
        self._state: decoding.DecodeState | None = None
        self._compiled: set[tuple] = set()

    @property
    def name(self) -> str:
        """The drafter's, or "vanilla"."""
        return self.engine.drafter.name

    def ask(self, ids: Sequence[int], max_new_tokens: int = 128) -> Answer:
        """The answer to a text, which begins with the conversation so far or parts from it.

        Raises:
          ValueError: an empty text, or one that leaves no room for an answer.
        """
        if int(max_new_tokens) != max_new_tokens or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {max_new_tokens} must be an integer >= 1")
        self.compile(ids)
        self.answer = Answer(self, ids, max_new_tokens)
        self.turns += 1
        return self.answer

    def clear(self) -> None:
        """Begins anew; a drafter that learns from use keeps what it has learnt."""
        if self._state is not None and self.drafter is not None:
            self.drafter = self.drafter.after(self._state)
            self.params = self.params | {"drafter": self.drafter.params}
        self.answer = self._state = None

    # ---- compiling -------------------------------------------------------------------------------

    def _program(self, ids) -> tuple:
        """What distinguishes the prefills that are compiled."""
        if not ids:
            raise ValueError("prompt: empty")
        if len(ids) >= self.room:
            raise ValueError(
                f"prompt: with it the conversation has {len(ids)} tokens; there is room for "
                f"{self.room}, the answer included"
            )
        if self._state is None:
            return "start", bucket(len(ids))
        return "resume", overlap(self.engine, self._state, [list(ids)])[1]

    def compiled(self, ids: Sequence[int]) -> bool:
        """Whether `ask` would find all it needs compiled. Raises ValueError as `ask` does."""
        return self._program(ids) in self._compiled

    def compile(self, ids: Sequence[int]) -> None:
        """Runs what the turn needs once, on a copy, so that the answer is timed without it."""
        program = self._program(ids)
        if program in self._compiled:
            return
        state = self._prefill(jax.tree.map(jnp.copy, self._state), ids, 1, 0)
        if self._state is None:
            state = decoding.jit_round(self.engine, self.params, state)
        jax.block_until_ready(_newest(state, self._most))
        self._compiled.add(program)

    # ---- decoding --------------------------------------------------------------------------------

    @property
    def _most(self) -> int:
        """Tokens that a round can emit."""
        return self.engine.drafter.depth + 1

    def _prefill(self, state, ids, limit: int, request: int) -> decoding.DecodeState:
        both, rows = (self.engine, self.params), [list(ids)]
        if state is None:
            return start(*both, rows, limit, self.seed, self.slots, first_request=request)
        return resume(*both, state, rows, limit, self.seed, request)

    def _advance(self, answer: Answer) -> tuple[list[int], bool]:
        """One round of the answer: (tokens emitted, whether it has ended)."""
        before = len(answer.prompt) + len(answer.tokens)
        if answer.tokens:
            self._state = decoding.jit_round(self.engine, self.params, self._state)
        else:
            begin = 0
            if self._state is not None:
                begin = int(overlap(self.engine, self._state, [answer.prompt])[0][0])
            answer.prefilled = len(answer.prompt) - begin
            self._state = self._prefill(self._state, answer.prompt, answer.limit, answer.request)
        tokens, length, done = jax.device_get(_newest(self._state, self._most))
        return tokens[self._most - (int(length) - before) :].tolist(), bool(done)


def stream(
    target: Target,
    prompt: str | Sequence[int],
    drafter: TrainedDrafter | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    rule: str | Rule | None = None,
) -> Iterator[Piece]:
    """`generate`'s answer to one prompt as it is accepted: an iterator over (text, draft depth).

    Special tokens have no text. Arguments and errors are `generate`'s.
    """
    (ids,) = encode_prompts(target, [prompt])
    sampling = Sampling(float(temperature), top_k, float(top_p))
    capacity = len(ids) + max_new_tokens
    conversation = Conversation(target, drafter, sampling, rule, seed, stop_tokens, capacity)
    answer = conversation.ask(ids, max_new_tokens)
    return (piece for pieces in answer for piece in pieces)
