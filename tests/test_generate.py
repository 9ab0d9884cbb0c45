"""experiments.generate: what stands on the screen, in a pipe, and how it ends."""

import fcntl
import io
import os
import pathlib
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import types

import numpy as np
import pytest
from absl import app
from rich.cells import cell_len
from rich.console import Console
from toys import toy_target
from transformers import PreTrainedTokenizerFast

import specjax
from experiments.generate import (
    Dialogue,
    agreement,
    converse,
    interruptible,
    open_drafter,
    take_turn,
)
from experiments.screens import LEAD, Lines, Panes, Pipe, Scroll, measures, race, status
from specjax.data.tokenizer import save_tokenizer, train_bpe
from specjax.models.hf import save_target
from specjax.shades import SHADES, terminal_style
from specjax.streaming import Conversation

ROOT = pathlib.Path(__file__).resolve().parents[1]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
BPE = train_bpe(["def main():\n    return 'naïve café'\n"], 290)


def make_target(**changes):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=BPE, bos_token=BPE.id_to_token(0), eos_token=BPE.id_to_token(1)
    )
    fields = dict(vocab_size=290, num_layers=2, max_position_embeddings=200, eos_token_ids=(1,))
    return toy_target(seed=34, tokenizer=tokenizer, **(fields | changes))


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def drafter(target):
    return specjax.init_drafter("prompt_lookup", target, max_ngram=1, draft_depth=3)


@pytest.fixture()
def pair(target, drafter):
    """Plain decoding and a drafter, with caches of one size."""
    talk = Conversation(target, drafter, stop_tokens=(), capacity=100)
    return [Conversation(target, stop_tokens=(), capacity=100, slots=talk.slots), talk]


def terminal(width, height=20):
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, width=width, height=height, color_system="truecolor",
        highlight=False, markup=False,
    )  # fmt: skip
    return console, file


def never():
    return False


# ---- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 40])
def test_every_character_keeps_its_shade_and_fits(width):
    rng, (console, _) = np.random.default_rng(width), terminal(width)
    words = ["def", " x", "\n", "(", "  ", "é", "漢字" if width > 1 else "z", "longer_than_that"]
    pieces = [(words[rng.integers(len(words))], int(rng.integers(12))) for _ in range(300)]
    lines, taken = Lines(console, width), []
    for piece in pieces:
        lines.add([piece])
        taken += lines.take()
    taken += [lines.last]
    assert max(cell_len(line.plain) for line in taken) <= width
    shown = [
        (char, line.get_style_at_offset(console, i))
        for line in taken
        for i, char in enumerate(line.plain)
        if char != " "
    ]
    meant = [(c, terminal_style(d)) for text, d in pieces for c in text if c not in " \n"]
    assert shown == meant
    newlines = sum(text.count("\n") for text, _ in pieces)
    assert len(taken) >= newlines + 1


def test_commands_to_the_terminal_are_shown_not_obeyed():
    console, _ = terminal(40)
    lines = Lines(console, 40)
    lines.add([("a\x1b[2Jb\x07\x9bc\td", 1)])
    assert lines.last.plain.split() == ["a␛[2Jb␇\ufffdc", "d"]


def test_shades_are_distinct_and_shared_with_the_report():
    from specjax.evaluation.page import STYLE

    styles = [terminal_style(depth) for depth in range(SHADES + 3)]
    assert len(set(styles)) == SHADES + 1 and not styles[0] and styles[-1] == styles[SHADES]
    assert all(f".d{depth} " in STYLE for depth in range(1, SHADES + 1))


# ---- measures ------------------------------------------------------------------------------------


def fake(tokens, accepts, seconds):
    return types.SimpleNamespace(tokens=tokens, accept_lengths=accepts, seconds=seconds)


def test_measures_against_a_hand_count():
    plain, drafted = fake([1] * 9, [1] * 9, 3.0), fake([1] * 9, [1, 3, 2, 3], 1.5)
    assert measures("vanilla", [plain]) == ["vanilla", "9 tokens", "3 tokens/s"]
    told = ["x", "9 tokens", "6 tokens/s", "tau 2.67"]
    assert measures("x", [drafted]) == told
    assert measures("x", [drafted], [plain]) == [*told, "2.00x vanilla"]
    both = measures("x", [drafted, fake([1], [1], 0.5)])
    assert both == ["x", "10 tokens", "5 tokens/s", "tau 2.67"]


def test_nothing_unmeasured_is_told():
    idle = fake([], [], 0.0)
    assert measures("x", [idle], [idle]) == ["x", "0 tokens"]
    assert measures("x", [fake([1], [1], 0.5)], [idle]) == ["x", "1 token", "2 tokens/s"]


@pytest.mark.parametrize("width", range(1, 70, 4))
def test_the_status_line_fits(width):
    line = status(["fasteagle", "128 tokens", "412 tokens/s", "tau 2.41", "1.18x vanilla"], width)
    assert len(line.plain) <= max(width, len("1.18x vanilla"))
    assert line.plain.endswith("1.18x vanilla")


def test_in_a_race_nobody_is_ahead_by_more_than_the_lead():
    class Runner:
        def __init__(self, step, rounds):
            self.step, self.rounds, self.seconds = step, rounds, 0.0

        def __next__(self):
            if not self.rounds:
                raise StopIteration
            self.rounds -= 1
            self.seconds += self.step
            return [("x", 0)]

    slow, fast = Runner(0.02, 50), Runner(0.003, 200)
    counts = [0, 0]
    for index, _ in race([slow, fast]):
        counts[index] += 1
        if slow.rounds and fast.rounds:
            assert abs(slow.seconds - fast.seconds) <= LEAD + 0.02
    assert counts == [50, 200]


# ---- screens -------------------------------------------------------------------------------------


def asked(pair, count=40, prompt=(7, 9, 4)):
    return [conversation.ask(prompt, count) for conversation in pair]


@pytest.mark.parametrize(("kind", "width"), [(Scroll, 40), (Panes, 100)])
def test_a_terminal_shows_all_text_and_leaves_the_cursor(pair, kind, width):
    console, file = terminal(width)
    answers = asked(pair)
    kind(console).play(["vanilla", "prompt_lookup"], answers, "before", never)
    page = file.getvalue()
    assert all(answer.ended for answer in answers) and answers[0].tokens == answers[1].tokens
    assert page.rfind("\x1b[?25h") > page.rfind("\x1b[?25l")  # the cursor is shown again
    final = ESCAPE.sub("", page[page.rfind("\x1b[?25h") :])
    assert max(cell_len(line) for line in final.splitlines()) <= width
    assert "x vanilla" in final and "tau" in final
    lines = Lines(console, width if kind is Scroll else (width - 3) // 2)
    lines.add([("before", 0), *answers[1].pieces])
    place, plain = 0, ESCAPE.sub("", page)
    for line in [*lines.take(), lines.last]:
        place = plain.find(line.plain.rstrip(), place)
        assert place >= 0, line.plain
    for depth in {depth for _, depth in answers[1].pieces if depth}:
        colour = terminal_style(depth).bgcolor.triplet
        assert f"48;2;{colour.red};{colour.green};{colour.blue}" in page


def test_a_pipe_gets_the_bare_answer(pair):
    out, errors = io.StringIO(), io.StringIO()
    answers = asked(pair)
    Pipe(out, errors).play(["vanilla", "prompt_lookup"], answers, "before", never)
    assert out.getvalue() == answers[1].text + "\n"
    first, second = errors.getvalue().splitlines()
    assert first.startswith("vanilla, 40 tokens") and second.endswith("x vanilla")
    assert "\x1b" not in out.getvalue() + errors.getvalue()


@pytest.mark.parametrize("kind", [Scroll, Panes, Pipe])
def test_stopping_keeps_what_was_said(pair, kind):
    console, file = terminal(100)
    screen = Pipe(file, io.StringIO()) if kind is Pipe else kind(console)
    answers = asked(pair)
    polls = iter([False] * 6)
    screen.play(["vanilla", "prompt_lookup"], answers, "", lambda: next(polls, True))
    assert 0 < len(answers[0].tokens) < 40 and not answers[1].ended
    follow = pair[0].ask(answers[0].prompt + answers[0].tokens + [5], 9)
    assert len([*follow]) == 9


def test_ctrl_c_ends_the_answer_and_a_second_one_more():
    handler = signal.getsignal(signal.SIGINT)
    with interruptible() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is handler


# ---- conversations -------------------------------------------------------------------------------


def test_a_plain_conversation_is_one_text(target, pair):
    dialogue, talk = Dialogue(target.tokenizer, None, None), pair[1]
    ids = dialogue.ids("def main")
    assert ids == target.tokenizer("def main")["input_ids"]
    answer = talk.ask(ids, 9)
    list(answer)
    dialogue.add("def main", answer)
    more = target.tokenizer.encode("\ncafé", add_special_tokens=False)
    assert dialogue.ids("café") == ids + answer.tokens + more
    dialogue.clear()
    assert dialogue.ids("def main") == ids


def test_a_chat_template_sees_all_messages(target, pair):
    dialogue = Dialogue(target.tokenizer, "vicuna", "be brief")
    answer = pair[1].ask(dialogue.ids("hi"), 5)
    list(answer)
    dialogue.add("hi", answer)
    text = target.tokenizer.decode(dialogue.ids("more"), skip_special_tokens=True)
    said = f"USER: hi ASSISTANT: {answer.text.strip()}"
    assert text == f"be brief {said}USER: more ASSISTANT:"


@pytest.mark.parametrize(
    ("template", "system", "words"),
    [("vicnua", None, "'vicnua' is unknown.*vicuna"), (None, "brief", "--system")],
)
def test_what_no_template_can_say_is_refused(target, template, system, words):
    with pytest.raises(app.UsageError, match=words):
        Dialogue(target.tokenizer, template, system)


def typed(pair, lines, max_new_tokens=20, width=120):
    console, file = terminal(width)
    lines = iter(lines)

    def read():
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    dialogue = Dialogue(pair[0].target.tokenizer, None, None)
    ended = converse(Scroll(console), pair, dialogue, read, max_new_tokens)
    return ended, ESCAPE.sub("", file.getvalue())


def test_a_conversation_turn_by_turn(pair):
    ended, page = typed(pair, ["def main", "", "café", "/new", "def main"])
    assert ended == 0 and pair[1].turns == 3
    assert page.count("all 20 tokens equal vanilla's") == 3
    assert page.count("a new conversation") == 1 and "in 3 answers:" in page
    assert "60 tokens" in page.splitlines()[-1] and "x vanilla" in page.splitlines()[-1]
    first = pair[1].answer.tokens
    whole = specjax.generate(pair[0].target, ["def main"], max_new_tokens=20, stop_tokens=())
    assert first == whole.tokens[0]


def test_a_conversation_that_outgrows_its_cache_says_so(pair):
    ended, page = typed(pair, ["def main", "x" * 70, "y" * 40, "café"], max_new_tokens=30)
    assert "there is room for 100, the answer included; /new begins another" in page
    assert "the conversation is full: 100 tokens" in page or "in 2 answers" in page
    assert ended == 0


def test_disagreement_is_told(pair):
    plain, drafted = fake([1, 2, 3], [], 0), fake([1, 2, 4], [], 0)
    assert "after 2 of 3 tokens: a tie" in agreement([plain, drafted], True)
    assert "lossy" in agreement([plain, drafted], False)
    assert agreement([plain, plain], True) == "all 3 tokens equal vanilla's"


def test_compiling_is_shown_and_not_timed(pair):
    said = []

    class Screen(Pipe):
        def working(self, text):
            said.append(text)
            return super().working(text)

    screen = Screen(io.StringIO(), io.StringIO())
    for _ in range(2):
        assert take_turn(screen, pair, [7, 9, 4], 9)
        for conversation in pair:
            conversation.clear()
    assert said == ["vanilla: compiling ...", "prompt_lookup: compiling ..."]


def test_drafters_without_training_go_by_name(target, tmp_path, drafter):
    assert open_drafter("token_recycling", target).name == "token_recycling"
    with pytest.raises(ValueError, match="medusa needs training"):
        open_drafter("medusa", target)
    drafter.save(tmp_path)
    assert open_drafter(str(tmp_path), target).definition == drafter.definition


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy target that talks without end."""
    folder = tmp_path_factory.mktemp("target")
    target = make_target(max_position_embeddings=4096)
    save_target(folder, target.config, target.params, "float32")
    save_tokenizer(BPE, folder, 4096)
    return folder


def command(folder, *arguments):
    return [
        sys.executable, "-m", "experiments.generate", f"--target={folder}",
        "--drafter=prompt_lookup", *arguments,
    ]  # fmt: skip


def piped(folder, *arguments, **options):
    options = dict(stdin=subprocess.DEVNULL, capture_output=True, timeout=300) | options
    return subprocess.run(command(folder, *arguments), cwd=ROOT, **options)


@pytest.mark.slow
def test_the_command_in_a_pipe(folder, tmp_path):
    done = piped(folder, "--prompt=def main", "--max_new_tokens=20", "--compare")
    out, errors = done.stdout.decode(), done.stderr.decode()
    whole = specjax.generate(make_target(max_position_embeddings=4096), ["def main"], None, 20)
    assert done.returncode == 0, errors
    assert out == whole.texts[0] + "\n" and "\x1b" not in out + errors
    assert "tokens/s" in errors and "x vanilla" in errors and "equal vanilla's" in errors
    gone = subprocess.Popen(
        command(folder, "--prompt=def", "--max_new_tokens=3000"), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    gone.stdout.read(1)
    gone.stdout.close()
    assert gone.stderr.read() == b"" and gone.wait(300) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt=x", "--target=/nowhere"], "--target: /nowhere"),
        ([], "standard input: empty"),
        (["--prompt=\udcff"], "not UTF-8"),
        (["--temperature=warm"], "--temperature=warm"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_status_2(folder, arguments, words):
    done = piped(folder, *arguments, errors="surrogateescape")
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


# A child must ask for its terminal itself, or Ctrl-C would reach nobody.
IN_CONTROL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A child on a pseudo-terminal of 40 columns."""

    def __init__(self, arguments):
        self.file, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 40, 0, 0))
        left_out = ("NO_COLOR", "COLUMNS", "LINES")
        environment = {k: v for k, v in os.environ.items() if k not in left_out}
        environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", IN_CONTROL, *arguments], cwd=ROOT, env=environment,
            stdin=its, stdout=its, stderr=its, start_new_session=True,
        )  # fmt: skip
        os.close(its)
        self.text, self.seen = "", 0

    def until(self, words: str) -> None:
        while words not in self.text[self.seen :]:
            try:
                self.text += os.read(self.file, 65536).decode(errors="replace")
            except OSError:  # the child has gone
                assert words in self.text[self.seen :], self.text
        self.seen += self.text[self.seen :].index(words) + len(words)

    def type(self, keys: bytes) -> None:
        os.write(self.file, keys)

    def end(self) -> int:
        try:
            while more := os.read(self.file, 65536):
                self.text += more.decode(errors="replace")
        except OSError:
            pass
        return self.child.wait(60)


@pytest.mark.slow
def test_the_command_on_a_terminal(folder):
    window = Terminal(command(folder, "--max_new_tokens=4000", "--context=4096"))
    window.until("draft depth")
    window.until("> ")
    window.type(b"def main\n")
    window.until("tau ")  # a round is over
    window.type(b"\x03")  # ends the answer
    window.until("\x1b[?25h")
    window.until("> ")
    window.type("café\n".encode())
    window.until("tokens/s")
    window.type(b"\x03")
    window.until("> ")
    window.type(b"\x04")  # ends the conversation
    window.until("in 2 answers:")
    assert window.end() == 0
    page = window.text
    assert "compiling" in page and "48;2;" in page
    assert page.rfind("\x1b[?25h") > page.rfind("\x1b[?25l")
    assert "Traceback" not in page
    summary = ESCAPE.sub("", page).split("in 2 answers:")[1]
    assert max(map(len, summary.splitlines())) <= 40
    assert re.search(r"\d+ tokens/s · tau \d\.\d\d$", " ".join(summary.split())), summary
