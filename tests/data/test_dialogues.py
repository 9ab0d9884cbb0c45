"""Conversations as training text: given, or written anew turn by turn by the target."""

import numpy as np
import pytest
from toys import greedy_continuations, random_target, truncated

from specjax.data import regenerate as regeneration
from specjax.data.assistant_mask import encode_conversation
from specjax.data.conversations import Conversation
from specjax.data.dialogues import contexts_of, given_dialogues, regenerated_dialogues
from specjax.data.templates import encode_chat
from specjax.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe

ROLES = ("user", "assistant")


def conversation(name, *turns, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ROLES[i % 2], "content": text} for i, text in enumerate(turns)]
    return Conversation(name, tuple(messages))


CONVERSATIONS = [
    conversation("a", "ab?", "b", "c?", "d"),
    conversation("b", "a", "no", system="s"),
    conversation("c", "c", "a", "b", "c", "and more"),
    conversation("long", "abcd " * 12, "a"),
    conversation("asked only", "d"),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe(["a b c d"], 258, ("<s>", "</s>")), folder, 128)
    return random_target(
        vocab_size=258, num_layers=1, hidden_size=16, intermediate_size=16, num_heads=1,
        num_kv_heads=1, tokenizer=load_tokenizer(folder), eos_token_ids=(1,),
    )  # fmt: skip


def regenerated(target, folder, conversations=CONVERSATIONS, **changes):
    settings = dict(
        template="plain", max_context=40, max_new_tokens=4, temperature=0.0, seed=0, batch=3
    )
    return regenerated_dialogues(target, conversations, **(settings | changes), folder=folder)


def test_given_text_has_its_answers_marked(target, capsys):
    marked = given_dialogues(target, CONVERSATIONS, "plain")
    expected = [
        encode_conversation(target.tokenizer, c.messages, "plain") for c in CONVERSATIONS[:4]
    ]
    assert marked == expected and "1 conversations without an answer" in capsys.readouterr().out
    for (ids, marks), context in zip(marked, contexts_of(marked), strict=True):
        assert (
            ids[: len(context)] == context
            and marks[len(context)]
            and not any(marks[: len(context)])
        )
    with pytest.raises(ValueError, match="no conversation in it has an answer"):
        given_dialogues(target, CONVERSATIONS[4:], "plain")
    with pytest.raises(ValueError, match="^a: template: the tokenizer has no chat template"):
        given_dialogues(target, CONVERSATIONS, None)


def slowly(target, messages, limit, count):
    """One conversation by full forwards: (ids, marks) as the target alone would have it go."""
    said, done, tokenizer = [], None, target.tokenizer
    for message in messages:
        if message["role"] == "assistant":
            continue
        said.append(message)
        if message["role"] == "system":
            continue
        context = encode_chat(tokenizer, said, template="plain")
        if len(context) > limit:
            break
        _, marks = encode_conversation(tokenizer, said, "plain", True)
        (endless,) = greedy_continuations(target, [context], count)
        new = truncated(endless, count, target.config.eos_token_ids)
        done = context + new, marks + [True] * len(new)
        answer = tokenizer.decode(new, skip_special_tokens=True)
        said.append({"role": "assistant", "content": answer})
    return done


def test_the_target_answers_every_turn_in_order(target, tmp_path, monkeypatch, capsys):
    found = regenerated(target, tmp_path)
    expected = [slowly(target, c.messages, 40, 4) for c in CONVERSATIONS]
    assert expected[3] is None  # its question alone is longer than a context may be
    assert found == [e for e in expected if e is not None]
    assert "1 conversations of more than 40 tokens" in capsys.readouterr().out
    runs = [int(np.sum(np.diff([0, *marks]) == 1)) for _, marks in found]
    assert runs == [2, 1, 3, 1]

    def not_again(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(regeneration, "continued", not_again)
    assert regenerated(target, tmp_path) == found


def test_an_interrupted_run_goes_on(target, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    real, calls = regeneration.continued, []

    def dying(*arguments):
        if len(calls) == 3:
            raise Killed
        calls.append(arguments[2])
        return real(*arguments)

    monkeypatch.setattr(regeneration, "continued", dying)
    with pytest.raises(Killed):
        regenerated(target, tmp_path)
    before, calls = list(calls), []
    monkeypatch.setattr(regeneration, "continued", dying)
    after = regenerated(target, tmp_path)
    assert not any(prompts in before for prompts in calls)
    monkeypatch.setattr(regeneration, "continued", real)
    assert after == regenerated(target, tmp_path / "whole")


def test_a_conversation_ends_where_its_context_is_too_long(target, tmp_path):
    short = regenerated(target, tmp_path, CONVERSATIONS[2:3], max_context=6)
    ((ids, marks),) = short
    assert (ids, marks) == slowly(target, CONVERSATIONS[2].messages, 6, 4)
    assert sum(np.diff([0, *marks]) == 1) < 3
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens: .* fits 2 tokens"):
        regenerated(target, tmp_path, CONVERSATIONS[2:3], max_context=2)
