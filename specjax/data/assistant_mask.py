"""Which tokens of an encoded conversation the assistant wrote: those a drafter is trained on.

A template that marks them (`{% generation %}`) is believed. Any other is found out by rendering:
what a conversation adds to the text up to the generation prompt of one of its answers is that
answer, end-of-turn marker included. This holds only where every such text is the beginning of the
whole; templates that rewrite what came before (that drop earlier reasoning, say) are refused.
"""

import re
from collections.abc import Sequence
from typing import Any

from specjax.data.templates import Message, chat_text

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    template: str | None = None,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """(token ids, which of them the assistant wrote) of a conversation.

    Args:
      tokenizer: a transformers fast tokenizer.
      messages, template, add_generation_prompt: as `templates.encode_chat`, whose ids these are.

    Raises:
      ValueError: `encode_chat`'s, and a template under which an answer's beginning or end cannot be
        told (names the message), or that does not mark every answer.
    """
    own = getattr(tokenizer, "chat_template", None)
    if template is None and isinstance(own, str) and _MARKED.search(own):
        return _as_marked(tokenizer, messages, add_generation_prompt)
    text = chat_text(tokenizer, messages, add_generation_prompt, template)
    spans = answer_spans(tokenizer, messages, text, template)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token is where its last character is: offsets leave out a token's leading spaces.
    marks = [
        any(start < end <= stop for start, stop in spans) for _, end in encoding["offset_mapping"]
    ]
    return list(encoding["input_ids"]), marks


def answer_spans(
    tokenizer: Any, messages: Sequence[Message], text: str, template: str | None = None
) -> list[tuple[int, int]]:
    """(start, end) of every answer in `text`, the rendered conversation, in characters."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat_text(tokenizer, messages[:index], True, template)
        after = chat_text(tokenizer, messages[: index + 1], False, template)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"chat template: the conversation up to messages[{index}] is not how the whole one "
                "begins, so what the assistant wrote cannot be told; a template with "
                "{% generation %} around answers is needed"
            )
        spans.append((len(before), len(after)))
    return spans


def _as_marked(tokenizer, messages, add_generation_prompt: bool):
    chat_text(tokenizer, messages, add_generation_prompt)  # its errors
    encoding = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, tokenize=True,
        return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    marks = [bool(mark) for mark in encoding["assistant_masks"]]
    runs = sum(mark and not before for before, mark in zip([False, *marks], marks, strict=False))
    answers = sum(message["role"] == "assistant" for message in messages)
    if runs != answers:
        raise ValueError(
            f"chat template: its {{% generation %}} marks {runs} of {answers} answers, all expected"
        )
    return list(encoding["input_ids"]), marks
