"""Conversations as training sequences: as they are, or every answer written anew by the target."""

from pathlib import Path

from specjax.data.assistant_mask import encode_conversation
from specjax.data.conversations import Conversation
from specjax.data.regenerate import regenerate
from specjax.data.templates import Message
from specjax.models.target import Target
from specjax.progress import say

Marked = tuple[list[int], list[bool]]  # token ids, which of them are trained on


def given_dialogues(target: Target, conversations, template: str | None) -> list[Marked]:
    """Each conversation as it stands, its answers marked; those without an answer are left out.

    Raises:
      ValueError: a conversation that the template cannot write (names it).
    """
    marked = [
        _encoded(target, c.name, c.messages, template)
        for c in conversations
        if any(m["role"] == "assistant" for m in c.messages)
    ]
    if not marked:
        raise ValueError("data.conversations: no conversation in it has an answer")
    _say_left_out(len(conversations) - len(marked), "without an answer")
    return marked


def regenerated_dialogues(
    target: Target,
    conversations: list[Conversation],
    template: str | None,
    max_context: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch: int,
    folder: Path,
) -> list[Marked]:
    """Each conversation with the target in the assistant's place, turn after turn.

    The target answers a question given its own answers to those before. All conversations take a
    turn together, cached by `regenerate`, so that an interrupted run goes on where it stopped. A
    conversation ends before the first question whose context is longer than `max_context` tokens
    (0: the model's own limit), and is left out where that is its first.

    Raises:
      ValueError: a conversation that the template cannot write (names it), or none that fits.
    """
    limit = target.config.max_position_embeddings - 1
    limit = min(max_context, limit) if max_context else limit
    said: list[list[Message]] = [[] for _ in conversations]
    result: list[Marked | None] = [None] * len(conversations)
    parts = [_turns(c.messages) for c in conversations]
    for turn in range(max(map(len, parts), default=0)):
        contexts = {}
        for i, questions in enumerate(parts):
            if turn < len(questions) and (turn == 0 or result[i] is not None):
                messages = [*said[i], *questions[turn]]
                context = _encoded(target, conversations[i].name, messages, template, True)
                if len(context[0]) <= limit:
                    said[i], contexts[i] = messages, context
                else:
                    parts[i] = questions[:turn]
        if not contexts:
            break
        say(f"data: turn {turn + 1} of {len(contexts)} conversations")
        prompts = [ids for ids, _ in contexts.values()]
        answers = regenerate(
            target, prompts, max_new_tokens, temperature, seed + turn, batch, folder
        )
        for (i, (ids, marks)), (whole, size) in zip(contexts.items(), answers, strict=True):
            new = whole[size:]
            result[i] = ids + new, marks + [True] * len(new)
            content = target.tokenizer.decode(new, skip_special_tokens=True)
            said[i] = [*said[i], {"role": "assistant", "content": content}]
    kept = [marked for marked in result if marked is not None]
    if not kept:
        raise ValueError(
            f"data.max_prompt_tokens: no conversation's first question fits {limit} tokens"
        )
    _say_left_out(len(result) - len(kept), f"of more than {limit} tokens before the first answer")
    return kept


def contexts_of(marked: list[Marked]) -> list[list[int]]:
    """What stands before the first answer of each."""
    return [ids[: marks.index(True)] if True in marks else ids for ids, marks in marked]


def _turns(messages) -> list[list[Message]]:
    """What is said to the assistant before each of its turns: [system,] user; then user, ..."""
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "system":
            turns.append([message])
        elif message["role"] == "user":
            if turns and turns[-1][-1]["role"] == "system":
                turns[-1].append(message)
            else:
                turns.append([message])
    return turns


def _encoded(target, name: str, messages, template, add_generation_prompt=False) -> Marked:
    try:
        return encode_conversation(target.tokenizer, messages, template, add_generation_prompt)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _say_left_out(count: int, why: str):
    if count:
        say(f"data: {count} conversations {why} left out")
