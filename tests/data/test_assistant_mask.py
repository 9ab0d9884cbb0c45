"""What the assistant wrote, token by token: marked by the template, or found by rendering."""

import numpy as np
import pytest

from specjax.data.assistant_mask import encode_conversation
from specjax.data.templates import FALLBACK_TEMPLATES, encode_chat
from specjax.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe

TEXT = "Be brief. One? Two and three. Answer: 1 is one\n\nYes; no. def f(x): return x é"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1 is one\n\né"},
    {"role": "user", "content": "  Two?"},
    {"role": "assistant", "content": "Yes; no."},
]
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>\n{% endgeneration %}{% else %}{{ m['content'] }}</s>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
# Drops what the assistant said before its newest answer, as templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}<{{ m['role'] }}>"
    "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe([TEXT] * 4, 300, ("<s>", "</s>")), folder, 128)
    return load_tokenizer(folder)


@pytest.fixture
def with_template(tokenizer):
    def give(template):
        tokenizer.chat_template = template
        return tokenizer

    yield give
    tokenizer.chat_template = None


def written(tokenizer, ids, marks):
    """Text of each run of marked tokens."""
    edges = np.flatnonzero(np.diff([0, *marks, 0]))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.decode(ids[a:b]) for a, b in runs]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_answers_with_their_ends_are_the_assistants(with_template, template):
    tokenizer = with_template(template)
    ids, marks = encode_conversation(tokenizer, MESSAGES)
    assert ids == encode_chat(tokenizer, MESSAGES, add_generation_prompt=False)
    assert written(tokenizer, ids, marks) == ["1 is one\n\né</s>\n", "Yes; no.</s>\n"]


def test_marking_and_rendering_agree(with_template):
    for messages in (MESSAGES, MESSAGES[1:3], MESSAGES[:4]):
        for prompted in (False, True):
            found = [
                encode_conversation(with_template(t), messages, None, prompted)
                for t in (PLAIN, MARKED)
            ]
            assert found[0] == found[1]


def test_a_context_is_the_prompt_that_is_decoded_from(with_template):
    tokenizer = with_template(PLAIN)
    ids, marks = encode_conversation(tokenizer, MESSAGES[:4], None, True)
    assert ids == encode_chat(tokenizer, MESSAGES[:4])
    assert written(tokenizer, ids, marks) == ["1 is one\n\né</s>\n"]
    assert not any(encode_conversation(tokenizer, MESSAGES[:2], None, True)[1])


EXPECTED = {
    "vicuna": [" 1 is one\n\né</s>", " Yes; no.</s>"],
    "llama2": [" 1 is one\n\né </s>", " Yes; no. </s>"],
    "plain": ["1 is one\n\né\n", "Yes; no.\n"],
}


@pytest.mark.parametrize("name", FALLBACK_TEMPLATES)
def test_fallback_templates(tokenizer, name):
    ids, marks = encode_conversation(tokenizer, MESSAGES, name)
    assert ids == encode_chat(tokenizer, MESSAGES, False, name)
    assert written(tokenizer, ids, marks) == EXPECTED[name]


def test_a_template_that_rewrites_what_was_said_is_refused(with_template):
    tokenizer = with_template(FORGETFUL)
    with pytest.raises(ValueError, match=r"up to messages\[2\] is not how the whole one begins"):
        encode_conversation(tokenizer, MESSAGES)
    encode_conversation(tokenizer, MESSAGES[:3])  # one answer: nothing to forget


def test_a_template_that_leaves_answers_unmarked_is_refused(with_template):
    tokenizer = with_template(MARKED.replace("== 'assistant'", "== 'assistant' and loop.last"))
    with pytest.raises(ValueError, match=r"\{% generation %\} marks 1 of 2 answers"):
        encode_conversation(tokenizer, MESSAGES)


def test_without_a_template(tokenizer):
    with pytest.raises(ValueError, match="no chat template; name one of"):
        encode_conversation(tokenizer, MESSAGES)
