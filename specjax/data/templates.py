"""From text and conversations to token ids: plain prompts, chat templates, several turns.

A message is {"role": "system" | "user" | "assistant", "content": text}. A tokenizer's own chat
template comes first; `FALLBACK_TEMPLATES` serves chat models whose tokenizers carry none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
# Other names that published conversations give the same speakers.
_ROLE_NAMES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class ChatTemplate:
    """How the parts of a conversation are written; {bos} and {eos} are the tokenizer's own.

    `opening` starts the text, `first_user` and `user` hold the user's turns ({system} is the
    filled-in system message), `generation` ends a text that the assistant is to continue.
    """

    opening: str
    system: str
    default_system: str
    first_user: str
    user: str
    assistant: str
    generation: str


FALLBACK_TEMPLATES: dict[str, ChatTemplate] = {
    # Vicuna 1.1 to 1.5: the roles in capitals, answers closed by the end token.
    "vicuna": ChatTemplate(
        opening="{bos}",
        system="{text} ",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant"
            " gives helpful, detailed, and polite answers to the user's questions."
        ),
        first_user="{system}USER: {text} ",
        user="USER: {text} ",
        assistant="ASSISTANT: {text}{eos}",
        generation="ASSISTANT:",
    ),
    # Llama 2 chat: the system message inside the first instruction, a begin token before each.
    "llama2": ChatTemplate(
        opening="",
        system="<<SYS>>\n{text}\n<</SYS>>\n\n",
        default_system="",
        first_user="{bos}[INST] {system}{text} [/INST]",
        user="{bos}[INST] {text} [/INST]",
        assistant=" {text} {eos}",
        generation="",
    ),
    # No markup: for base models, each message on lines of its own.
    "plain": ChatTemplate(
        opening="{bos}",
        system="{text}\n",
        default_system="",
        first_user="{system}{text}\n",
        user="{text}\n",
        assistant="{text}\n",
        generation="",
    ),
}


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a plain text with the tokenizer's own special tokens and no chat template.

    `tokenizer` is a transformers tokenizer or a `tokenizers.Tokenizer`. Raises ValueError for an
    empty text.
    """
    if not text:
        raise ValueError("prompt: an empty text")
    return _encode(tokenizer, text, add_special_tokens=True)


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    template: str | None = None,
) -> list[int]:
    """Token ids of a conversation.

    `template` names a fallback; None means the tokenizer's own chat template. With
    `add_generation_prompt` the ids end where the assistant's answer is to begin. Raises ValueError
    for messages of another shape, for an unknown `template`, and, naming the fallbacks, where the
    tokenizer has no template.
    """
    text = chat_text(tokenizer, messages, add_generation_prompt, template)
    # Templates write the begin token themselves: adding it would double it.
    return _encode(tokenizer, text, add_special_tokens=False)


def chat_text(
    tokenizer: Any,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    template: str | None = None,
) -> str:
    """The text of a conversation; arguments and errors as `encode_chat`'s."""
    check_messages(messages)
    if template is not None:
        bos, eos = (getattr(tokenizer, name, None) or "" for name in ("bos_token", "eos_token"))
        return render_chat(template, messages, add_generation_prompt, bos, eos)
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    raise ValueError(
        f"template: the tokenizer has no chat template; name one of {_fallback_names()}"
    )


def render_chat(
    template: str, messages: Sequence[Message], add_generation_prompt: bool, bos: str, eos: str
) -> str:
    """The text of a conversation in a fallback template. Raises ValueError for an unknown name."""
    if template not in FALLBACK_TEMPLATES:
        raise ValueError(f"template: {template!r} is unknown, one of {_fallback_names()} expected")
    check_messages(messages)
    form = FALLBACK_TEMPLATES[template]
    given = messages[0]["role"] == "system"
    system = messages[0]["content"] if given else form.default_system
    system = form.system.format(text=system) if system else ""
    parts = [form.opening.format(bos=bos)]
    for index, message in enumerate(messages[given:]):
        if message["role"] == "assistant":
            parts.append(form.assistant.format(text=message["content"], eos=eos))
        else:
            line = form.user if index else form.first_user
            parts.append(line.format(text=message["content"], system=system, bos=bos))
    if add_generation_prompt:
        parts.append(form.generation)
    return "".join(parts)


def turn_messages(
    turns: Sequence[str], answers: Sequence[str] = (), system: str | None = None
) -> list[Message]:
    """The conversation up to the user's next turn, given the answers to the turns before.

    Raises ValueError where there are as many answers as turns, or more.
    """
    if len(answers) >= len(turns):
        raise ValueError(f"answers: {len(answers)} to {len(turns)} turns leave no turn to answer")
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn, answer in zip(turns, answers, strict=False):
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": turns[len(answers)]}]


def first_question(row: str) -> str | None:
    """The first user message of a raw row; None where nobody asks anything.

    Crawled conversations often begin in the middle, with an answer: only the question is read.
    """
    for message in raw_messages(row):
        content = message["content"]
        if message["role"] == "user" and isinstance(content, str) and content.strip():
            return content
    return None


def raw_messages(row: str | dict) -> list[Message]:
    """The messages of one conversation row as they stand, {"role", "content"} each.

    Raises:
      ValueError: not JSON, or no form of conversation that is known.
    """
    try:
        fields = row if isinstance(row, dict) else json.loads(row)
    except json.JSONDecodeError as error:
        raise ValueError(f"conversation: not JSON ({error})") from error
    fields = fields if isinstance(fields, dict) else {}
    items = fields.get("messages", fields.get("conversations"))
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError("conversation: 'messages' or 'conversations', a list of objects, expected")
    messages = []
    for item in items:
        role = item.get("role", item.get("from"))
        content = item.get("content", item.get("value"))
        role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
        messages.append({"role": role, "content": content})
    return messages


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ValueError, naming the message and the field, unless these are a conversation.

    That is: user and assistant by turns, the user first, after at most one system message.
    """
    if not messages:
        raise ValueError("messages: empty, at least one user message expected")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{index}]: {message!r}, an object expected")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{index}].role: {role!r} is none of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"messages[{index}].content: {content!r}, a string expected")
    given = messages[0]["role"] == "system"
    for index, message in enumerate(messages[given:]):
        expected = ROLES[1 + index % 2]
        if message["role"] != expected:
            where = f"messages[{index + given}].role"
            raise ValueError(f"{where}: {message['role']!r}, {expected!r} expected in turn")
    if len(messages) == given:
        raise ValueError("messages: a system message alone, at least one user message expected")


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    encoding = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return list(getattr(encoding, "ids", encoding))


def _fallback_names() -> str:
    return ", ".join(FALLBACK_TEMPLATES)
