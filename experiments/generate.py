"""Watches a target and a drafter write: a prompt's answer, or a conversation, in the terminal.

python -m experiments.generate --target=FOLDER [--drafter=FOLDER] [--prompt=TEXT] [--compare]

Text is shaded by the draft depth that proposed it. Without --prompt it is a conversation, which
keeps its caches between turns: only new text is prefilled. --compare decodes each answer plainly
too, each timed alone. Ctrl-C ends an answer, Ctrl-D the conversation, /new begins another. Where
the output is no terminal it is the answer alone, and what was measured goes to standard error;
a prompt may be piped in.

Exit status: 0, 2 if the flags or what they name are wrong, 130 if a prompt's answer was cut short.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from absl import app, flags, logging

from experiments import commands
from experiments.commands import tried, usage_error
from experiments.screens import measures, open_screen
from specjax import init_drafter, load_drafter, load_target
from specjax.data.templates import FALLBACK_TEMPLATES, encode_chat, encode_prompt, turn_messages
from specjax.drafters import DRAFTERS
from specjax.sampling import Sampling
from specjax.streaming import Answer, Conversation

_TARGET = flags.DEFINE_string("target", "builtin", "'builtin', a model folder or a hub id")
_DRAFTER = flags.DEFINE_string(
    "drafter", None, "drafter folder, or the name of one that needs no training; none: vanilla"
)
_PROMPT = flags.DEFINE_string("prompt", None, "text to answer; none: a conversation")
_COMPARE = flags.DEFINE_bool("compare", False, "decode plainly too, to measure the speedup")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "new tokens an answer", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k most probable tokens, 0 = all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "keep the most probable tokens up to this mass, 1 = all")
_RULE = flags.DEFINE_string("rule", None, "verification rule; none: the drafter's default")
_SEED = flags.DEFINE_integer("seed", 0, "of sampling")
_SYSTEM = flags.DEFINE_string("system", None, "system message, for a target with a chat template")
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template",
    None,
    f"one of {', '.join(FALLBACK_TEMPLATES)}, or 'none' for text as it is; "
    "none given: the tokenizer's own, where it has one",
)
_CONTEXT = flags.DEFINE_integer(
    "context",
    1024,
    "tokens that a conversation may have; every round reads them all",
    lower_bound=2,
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "of the target")

NO_TEMPLATE = "none"
PROMPT_LINES = 8  # of a prompt that is continued as it is, these last ones are shown


# ---- conversations as token ids ------------------------------------------------------------------


class Dialogue:
    """What has been said, as token ids: in a chat template, or one text that goes on and on."""

    def __init__(self, tokenizer, template: str | None, system: str | None):
        own = getattr(tokenizer, "chat_template", None)
        self.plain = template == NO_TEMPLATE or (template is None and not own)
        if self.plain and system is not None:
            raise app.UsageError("--system: without a chat template there is no system message")
        if template not in (None, NO_TEMPLATE, *FALLBACK_TEMPLATES):
            names = ", ".join([*FALLBACK_TEMPLATES, NO_TEMPLATE])
            raise app.UsageError(
                f"--chat_template: {template!r} is unknown, one of {names} expected"
            )
        self._tokenizer, self._template, self._system = tokenizer, template, system
        self.clear()

    def clear(self) -> None:
        self._turns: list[str] = []
        self._answers: list[str] = []
        self._ids: list[int] = []  # of a plain text so far

    def ids(self, turn: str) -> list[int]:
        """Token ids of all that has been said and this."""
        if not self.plain:
            messages = turn_messages([*self._turns, turn], self._answers, self._system)
            return encode_chat(self._tokenizer, messages, template=self._template)
        if not self._ids:
            return encode_prompt(self._tokenizer, turn)
        return self._ids + self._tokenizer.encode("\n" + turn, add_special_tokens=False)

    def add(self, turn: str, answer: Answer) -> None:
        """Takes in a turn and its answer, as far as it got."""
        self._turns.append(turn)
        self._answers.append(answer.text.strip())
        self._ids = answer.prompt + answer.tokens[: len(answer.tokens) - answer.stopped]


# ---- one turn ------------------------------------------------------------------------------------


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed; a second one interrupts at once.

    An interrupt inside a round would lose the state that the round had consumed.
    """
    pressed = False

    def press(*_):
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def take_turn(
    screen, conversations: Sequence[Conversation], ids, max_new_tokens, before=""
) -> bool:
    """Decodes one answer by each and shows them; False where it was cut short.

    Raises ValueError for a text that leaves no room for an answer.
    """
    names = [conversation.name for conversation in conversations]
    with interruptible() as stop:
        for name, conversation in zip(names, conversations, strict=True):
            if not conversation.compiled(ids):
                with screen.working(f"{name}: compiling ..."):
                    conversation.compile(ids)
        answers = [conversation.ask(ids, max_new_tokens) for conversation in conversations]
        screen.play(names, answers, before, stop)
        whole = not stop()
    newest = answers[-1]
    if whole and len(answers) > 1 and all(c.engine.sampling.greedy for c in conversations):
        screen.say(agreement(answers, conversations[-1].engine.rule.exact))
    if newest.ended and not newest.stopped and newest.limit < max_new_tokens:
        screen.say(f"the conversation is full: {conversations[-1].room} tokens")
    return whole


def agreement(answers: Sequence[Answer], exact: bool) -> str:
    """Whether greedy answers are the same, token for token."""
    plain, drafted = (answer.tokens for answer in answers)
    if plain == drafted:
        return f"all {len(plain)} tokens equal vanilla's"
    pairs = zip(plain, drafted, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain), len(drafted)))
    why = "a tie, or experiments.verify has something to find" if exact else "the rule is lossy"
    return f"differs from vanilla's after {same} of {len(plain)} tokens: {why}"


class Totals:
    """All answers of a conversation, for the line at its end."""

    def __init__(self, conversations: Sequence[Conversation]):
        self._conversations = conversations
        self._answers: list[list[Answer]] = [[] for _ in conversations]

    def add(self) -> None:
        for answers, conversation in zip(self._answers, self._conversations, strict=True):
            answers.append(conversation.answer)

    def say(self, screen) -> None:
        turns = len(self._answers[0])
        if turns < 2:  # one answer has had its own line
            return
        screen.say(f"in {turns} answers:")
        for index, (c, answers) in enumerate(zip(self._conversations, self._answers, strict=True)):
            screen.say(*measures(c.name, answers, self._answers[0] if index else None))


def answer_prompt(screen, conversations, dialogue: Dialogue, prompt: str, max_new_tokens) -> int:
    """Answers one prompt. Returns the exit status."""
    before = ""
    if dialogue.plain:
        lines = prompt.split("\n")
        before = "\n".join(lines[-PROMPT_LINES:])
        before = before if len(lines) <= PROMPT_LINES else f"...\n{before}"
    whole = take_turn(screen, conversations, dialogue.ids(prompt), max_new_tokens, before)
    return 0 if whole else 130


def converse(screen, conversations, dialogue: Dialogue, read, max_new_tokens: int) -> int:
    """Turn after turn, until Ctrl-D or a Ctrl-C while nothing is answered. Returns the exit status.

    `read()` returns the next line and raises EOFError after the last.
    """
    totals = Totals(conversations)
    try:
        while True:
            line = read()
            if line.strip() == "/new":
                dialogue.clear()
                for conversation in conversations:
                    conversation.clear()
                screen.say("a new conversation")
            elif line.strip():
                check_utf8("standard input", line)
                ids = dialogue.ids(line)
                try:
                    take_turn(screen, conversations, ids, max_new_tokens)
                except ValueError as error:
                    screen.say(f"{error}; /new begins another, nothing was dropped")
                    continue
                totals.add()
                dialogue.add(line, conversations[-1].answer)
    except (EOFError, KeyboardInterrupt):
        screen.say("")
        totals.say(screen)
    return 0


# ---- flags ---------------------------------------------------------------------------------------


def check_utf8(where: str, text: str) -> str:
    """The text itself. Raises app.UsageError where it holds bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise app.UsageError(f"{where}: not UTF-8 at character {error.start}") from error
    return text


def piped_prompt() -> str:
    """All of standard input."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise app.UsageError(f"standard input: not UTF-8 at byte {error.start}") from error


def open_drafter(name_or_folder: str, target):
    """A drafter from a folder, or fresh by name where it needs no training."""
    family = DRAFTERS.get(name_or_folder)
    if family is None or os.path.isdir(name_or_folder):
        return load_drafter(name_or_folder, target)
    drafter = init_drafter(name_or_folder, target)
    if drafter.definition.trained:
        raise ValueError(f"{name_or_folder} needs training; give the folder of a trained one")
    return drafter


def read_flags() -> tuple[list[Conversation], Dialogue, str | None]:
    """(conversations, plain decoding's first; what has been said; the prompt).

    Raises app.UsageError.
    """
    try:
        sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    except ValueError as error:
        raise app.UsageError(f"--{error}") from error  # starts with the field
    prompt = _PROMPT.value
    if prompt is None and not sys.stdin.isatty():
        prompt = piped_prompt()
        if not prompt:
            raise app.UsageError("standard input: empty, a prompt expected (or give --prompt)")
    if prompt is not None:
        check_utf8("--prompt", prompt)
        if not prompt:
            raise app.UsageError("--prompt: empty")
    if _SYSTEM.value is not None:
        check_utf8("--system", _SYSTEM.value)
    target = tried("target", load_target, _TARGET.value, _DTYPE.value)
    dialogue = Dialogue(target.tokenizer, _CHAT_TEMPLATE.value, _SYSTEM.value)
    drafter = tried("drafter", open_drafter, _DRAFTER.value, target) if _DRAFTER.value else None
    if _COMPARE.value and drafter is None:
        raise app.UsageError("--compare: needs a --drafter to compare with plain decoding")
    options = dict(seed=_SEED.value, capacity=_CONTEXT.value)
    if prompt is not None:
        options["capacity"] = len(dialogue.ids(prompt)) + _MAX_NEW_TOKENS.value
    conversation = tried("rule", Conversation, target, drafter, sampling, _RULE.value, **options)
    conversations = [conversation]
    if _COMPARE.value:  # with a cache of the same size, as every round reads all of it
        plain = Conversation(target, None, sampling, slots=conversation.slots, **options)
        conversations = [plain, conversation]
    return conversations, dialogue, prompt


def reader() -> Callable[[], str]:
    """Reads a line that a person types."""
    try:
        import readline  # noqa: F401, gives `input` line editing and history
    except ImportError:
        pass
    shown = "> " if sys.stdout.isatty() else ""
    return lambda: input(shown)


def run() -> int:
    """What the flags ask for. Returns the exit status."""
    screen = open_screen()
    with screen.working("loading ..."):
        conversations, dialogue, prompt = read_flags()
    newest = conversations[-1]
    screen.legend(newest.engine.drafter.depth)
    try:
        if prompt is not None:
            return answer_prompt(screen, conversations, dialogue, prompt, _MAX_NEW_TOKENS.value)
        return converse(screen, conversations, dialogue, reader(), _MAX_NEW_TOKENS.value)
    except UnicodeDecodeError as error:
        raise app.UsageError(f"standard input: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise usage_error("prompt", error) from error


def main():
    logging.set_verbosity(logging.WARNING)  # jax tells of the accelerators that are not there
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while loading, or pressed twice
        sys.exit(130)
    except BrokenPipeError:  # the reader has gone; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    commands.run(main)
