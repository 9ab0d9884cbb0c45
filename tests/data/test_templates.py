import json

import pytest

from specjax.data.templates import (
    FALLBACK_TEMPLATES,
    check_messages,
    encode_chat,
    encode_prompt,
    raw_messages,
    render_chat,
    turn_messages,
)
from specjax.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe

TURNS, ANSWERS = ("Hi {x}", "Again"), ("Hello",)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe(["some text"], 260, ("<s>", "</s>")), folder, 128)
    return load_tokenizer(folder)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def test_a_prompt_gets_special_tokens_and_no_template(chat_tokenizer):
    ids = encode_prompt(chat_tokenizer, "some text")
    assert ids[0] == 0 and chat_tokenizer.decode(ids[1:]) == "some text"
    assert encode_prompt(chat_tokenizer.backend_tokenizer, "some text") == ids
    with pytest.raises(ValueError, match="empty"):
        encode_prompt(chat_tokenizer, "")


def test_the_tokenizers_own_template_comes_first(chat_tokenizer):
    messages = turn_messages(TURNS, ANSWERS)
    text = chat_tokenizer.decode(encode_chat(chat_tokenizer, messages))
    assert text == "<s>[user]Hi {x}[assistant]Hello[user]Again[assistant]"
    text = chat_tokenizer.decode(encode_chat(chat_tokenizer, messages, add_generation_prompt=False))
    assert text == "<s>[user]Hi {x}[assistant]Hello[user]Again"


def test_fallbacks_are_named_where_there_is_no_template(tokenizer):
    messages = turn_messages(TURNS)
    for name in FALLBACK_TEMPLATES:
        ids = encode_chat(tokenizer, messages, template=name)
        assert ids[0] == 0 and ids.count(0) == 1
    with pytest.raises(ValueError, match="no chat template; name one of vicuna, llama2, plain"):
        encode_chat(tokenizer, messages)
    with pytest.raises(ValueError, match="'alpaca' is unknown, one of vicuna, llama2, plain"):
        encode_chat(tokenizer, messages, template="alpaca")


def test_an_end_token_in_a_template_is_one_id(tokenizer):
    ids = encode_chat(tokenizer, turn_messages(TURNS, ANSWERS), template="llama2")
    assert ids.count(0) == 2 and ids.count(1) == 1


def test_fallback_texts():
    messages = turn_messages(TURNS, ANSWERS, system="Be brief.")
    render = {name: render_chat(name, messages, True, "<s>", "</s>") for name in FALLBACK_TEMPLATES}
    assert render == {
        "vicuna": "<s>Be brief. USER: Hi {x} ASSISTANT: Hello</s>USER: Again ASSISTANT:",
        "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi {x} [/INST] Hello </s>"
        "<s>[INST] Again [/INST]",
        "plain": "<s>Be brief.\nHi {x}\nHello\nAgain\n",
    }
    assert render_chat("llama2", turn_messages(["Hi"]), True, "", "") == "[INST] Hi [/INST]"
    assert render_chat("vicuna", turn_messages(["Hi"]), True, "", "").startswith("A chat between")


def test_turns_and_answers_alternate():
    assert turn_messages(TURNS) == [{"role": "user", "content": "Hi {x}"}]
    roles = [message["role"] for message in turn_messages(TURNS, ANSWERS, system="s")]
    assert roles == ["system", "user", "assistant", "user"]
    with pytest.raises(ValueError, match="2 to 2 turns"):
        turn_messages(TURNS, ("a", "b"))


def test_conversations_in_both_styles():
    openai = {"messages": turn_messages(TURNS, ANSWERS)}
    people = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {"from": people[message["role"]], "value": message["content"]}
        for message in openai["messages"]
    ]
    expected = openai["messages"]
    check_messages(expected)
    assert raw_messages(json.dumps(openai)) == expected
    assert raw_messages(json.dumps({"conversations": sharegpt})) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "conversation: not JSON"),
        ("[]", "'messages' or 'conversations'"),
        ('{"messages": ["a"]}', "a list of objects"),
        ('{"messages": []}', "messages: empty"),
        ('{"messages": [{"role": "robot", "content": ""}]}', r"messages\[0\]\.role: 'robot'"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]\.content: None, a string"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "'user' expected in turn"),
        ('{"messages": [{"role": "system", "content": ""}]}', "a system message alone"),
    ],
)
def test_bad_conversations(row, message):
    with pytest.raises(ValueError, match=message):
        check_messages(raw_messages(row))


def test_two_user_messages_in_a_row():
    twice = [{"role": "user", "content": "a"}] * 2
    with pytest.raises(ValueError, match=r"messages\[1\]\.role: 'user', 'assistant' expected"):
        render_chat("plain", twice, True, "", "")
    with pytest.raises(ValueError, match=r"messages\[0\]: 'a', an object expected"):
        render_chat("plain", ["a"], True, "", "")
