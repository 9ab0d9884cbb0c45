"""Streaming: text that joins up to what `generate` returns, and conversations that keep caches."""

import itertools

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers
from toys import toy_target
from transformers import PreTrainedTokenizerFast

import specjax
from specjax import decoding, streaming
from specjax.data.tokenizer import train_bpe
from specjax.streaming import Conversation, Detokenizer

TEXTS = [
    "def main():\n    return 'naïve café'  # ok\n",
    "一二三四五 ☃ 🙂🙂 – “quoted”, é",
    "  two  spaces   and\ttabs \n\n end ",
    "👩‍👩‍👧‍👦 family, ﷽ and Ωμέγα",
]


def byte_level():
    """A BPE over bytes with few merges: most characters outside ASCII take several tokens."""
    bpe = train_bpe(TEXTS[:1], 300)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bpe.id_to_token(0), eos_token=bpe.id_to_token(1)
    )


def sentence_piece():
    """In the manner of Llama 2: a space before the first word, unknown characters as bytes."""
    words = ["▁", "▁two", "▁end", "▁return", "ma", "in", "▁de", "f"]
    letters = sorted({c for c in "".join(TEXTS) if c.isascii()} - {" "})
    pieces = ["<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *words, *letters]
    pieces = list(dict.fromkeys(pieces))
    scores = [(piece, -1.0 * (len(piece) == 1) - 1) for piece in pieces]
    model = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=lambda f: f.__name__)
def tokenizer(request):
    return request.param()


def spoken(tokenizer, ids, context=()):
    """(text as it comes, what was held back to the end)."""
    words = Detokenizer(tokenizer, context)
    return [words.feed(token) for token in ids], words.flush()


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_up_to_the_whole_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, rest = spoken(tokenizer, ids)
    assert rest == ""
    assert "".join(pieces) == tokenizer.decode(ids) == text
    # No character is told before it is whole, and none is kept waiting once it is.
    for n in range(len(ids) + 1):
        said, so_far = "".join(pieces[:n]), tokenizer.decode(ids[:n])
        assert text.startswith(said)
        assert "\ufffd" in so_far or said == so_far


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_goes_on_keeps_its_spaces(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    for cut in range(len(ids)):
        before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
        if not before.endswith("\ufffd"):
            assert before + "".join(spoken(tokenizer, ids[cut:], ids[:cut])[0]) == whole


def test_special_tokens_have_no_text(tokenizer):
    ids = tokenizer.encode("two end", add_special_tokens=False)
    end = tokenizer.eos_token_id
    pieces, rest = spoken(tokenizer, [*ids, end, *ids, end])
    assert tokenizer.eos_token not in "".join(pieces) and rest == ""
    assert "".join(pieces).split() in (["two", "endtwo", "end"], ["two", "end", "two", "end"])


def test_what_never_becomes_a_character_is_told_in_the_end(tokenizer):
    (*ids, _) = tokenizer.encode("f☃", add_special_tokens=False)
    pieces, rest = spoken(tokenizer, ids)
    assert "".join(pieces) == "f" and set(rest) == {"\ufffd"}
    assert "".join(spoken(tokenizer, [*ids, tokenizer.eos_token_id])[0]) == "f" + rest


def test_random_bytes_lose_nothing():
    """Byte-level tokens in any order: broken characters are U+FFFD, as in the whole text."""
    tokenizer, rng = byte_level(), np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(2, len(tokenizer), 12).tolist()
        pieces, rest = spoken(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)


# ---- streams -------------------------------------------------------------------------------------

CONTEXT, EOS = 200, 5
OPTIONS = [dict(), dict(temperature=1.0, seed=3), dict(stop_tokens=()), dict(max_new_tokens=1)]


@pytest.fixture(scope="module")
def target():
    tokenizer = train_bpe(TEXTS, 258)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=tokenizer.id_to_token(0), eos_token="<|end_of_text|>"
    )
    return toy_target(
        seed=34, num_layers=2, vocab_size=258, max_position_embeddings=CONTEXT,
        eos_token_ids=(EOS,), tokenizer=fast,
    )  # fmt: skip


@pytest.fixture(scope="module")
def drafter(target):
    return specjax.init_drafter("prompt_lookup", target, max_ngram=1, draft_depth=3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stream_is_what_generate_returns(target, drafter, options):
    options = dict(max_new_tokens=40) | options
    out = specjax.generate(target, ["def"], drafter, **options)
    pieces = list(streaming.stream(target, "def", drafter, **options))
    text = target.tokenizer.decode(out.tokens[0], skip_special_tokens=True)
    assert "".join(text for text, _ in pieces) == text
    assert max(depth for _, depth in pieces) == max(out.accept_lengths[0]) - 1
    assert all(text for text, _ in pieces)


def test_a_stream_decodes_no_more_than_is_asked_for(target, drafter, monkeypatch):
    rounds = []
    jit_round = decoding.jit_round
    pieces = streaming.stream(target, "def", drafter, max_new_tokens=40, stop_tokens=())
    monkeypatch.setattr(decoding, "jit_round", lambda *a: rounds.append(1) or jit_round(*a))
    next(pieces)
    assert not rounds
    list(itertools.islice(pieces, 2))
    assert 0 < len(rounds) < 10


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, r"prompts\[0\]: empty"),
        ([300], {}, "outside the vocabulary"),
        ([1] * CONTEXT, {}, f"{CONTEXT} tokens; there is room for {CONTEXT}"),
        ("def", dict(max_new_tokens=0), "max_new_tokens: 0"),
        ("def", dict(temperature=-1.0), "temperature: -1.0"),
        ("def", dict(rule="mtach"), "rule: 'mtach'"),
    ],
)
def test_bad_input_is_named_before_anything_is_decoded(target, drafter, prompt, options, words):
    with pytest.raises(ValueError, match=words):
        streaming.stream(target, prompt, drafter, **options)


# ---- conversations -------------------------------------------------------------------------------


def opened(target, drafter, **options):
    return Conversation(target, drafter, **dict(stop_tokens=(), capacity=150) | options)


def finished(answer):
    for _ in answer:
        pass
    return answer


def scratch(target, drafter, ids, count, **options):
    return specjax.generate(target, [ids], drafter, count, **dict(stop_tokens=()) | options)


def test_turns_equal_answers_from_scratch(target, drafter):
    """Answers cut short, repeated, changed: the cache never shows."""
    talk = opened(target, drafter)
    texts = [[7, 9, 4]]
    for rounds, more in [(99, [3, 7]), (2, [5]), (1, [9] * 20), (99, [])]:
        answer = talk.ask(texts[-1], 12)
        for _ in itertools.islice(answer, rounds):
            pass
        whole = scratch(target, drafter, texts[-1], 12).tokens[0]
        assert answer.tokens == whole[: len(answer.tokens)]
        assert answer.ended == (rounds == 99) and (not answer.ended or answer.tokens == whole)
        assert sum(answer.accept_lengths) == len(answer.tokens) and answer.seconds > 0
        texts.append(answer.prompt + answer.tokens + more)
    for ids in (texts[2], texts[1][:-1], texts[3][:10] + [1, 2, 3], [7], texts[-1]):
        assert finished(talk.ask(ids, 12)).tokens == scratch(target, drafter, ids, 12).tokens[0]


def test_only_what_is_new_is_run(target, drafter):
    talk = opened(target, drafter)
    first = finished(talk.ask([7] * 60, 12))
    assert first.prefilled == 60
    more = finished(talk.ask(first.prompt + first.tokens + [1, 2, 3], 12))
    assert more.prefilled == 3 + 1 + drafter.definition.depth + 1


def test_nothing_is_compiled_inside_a_bucket(target, drafter):
    talk, ids, earlier = opened(target, drafter), [7, 9, 4], None
    functions = (
        decoding.jit_round, decoding._extend_target, decoding._first_state, streaming._newest,
        decoding._prefill_target,
    )  # fmt: skip
    for turn in range(4):
        assert talk.compiled(ids) == (turn > 1)
        answer = talk.ask(ids, 9 + turn)
        warm = [f._cache_size() for f in functions]
        finished(answer)
        assert [f._cache_size() for f in functions] == warm  # the answer was timed without it
        if turn > 1:
            assert warm == earlier
        earlier, ids = warm, answer.prompt + answer.tokens + [turn] * (turn + 1)


def test_turns_do_not_share_noise(target, drafter):
    sampling = specjax.sampling.Sampling(1.0)
    talk = opened(target, drafter, sampling=sampling, seed=4)
    first, again = (finished(talk.ask([7, 9, 4], 30)).tokens for _ in range(2))
    assert first != again
    assert first == scratch(target, drafter, [7, 9, 4], 30, temperature=1.0, seed=4).tokens[0]


def test_an_earlier_answer_does_not_go_on(target, drafter):
    talk = opened(target, drafter)
    first = talk.ask([7, 9], 12)
    next(first)
    second = talk.ask([1, 2], 12)
    assert list(first) == [] and len(first.tokens) == 1
    assert finished(second).tokens == scratch(target, drafter, [1, 2], 12).tokens[0]


def test_a_conversation_that_is_full_says_so_and_keeps_what_it_has(target, drafter):
    talk = opened(target, drafter)
    first = finished(talk.ask([7] * 140, 12))
    assert len(first.tokens) == 10 and first.ended and not first.stopped
    with pytest.raises(ValueError, match="conversation has 151 tokens; there is room for 150"):
        talk.ask(first.prompt + first.tokens + [1], 12)
    assert finished(talk.ask(first.prompt, 12)).tokens == first.tokens
    with pytest.raises(ValueError, match="empty"):
        talk.ask([], 12)


def test_what_a_drafter_learns_outlives_a_turn_and_a_conversation(target):
    learner = specjax.init_drafter("token_recycling", target, successors=3, tree_nodes=8)
    talk = opened(target, learner)
    first = finished(talk.ask([7, 9, 4], 30))
    second = finished(talk.ask([7, 9, 4], 30))
    assert second.tokens == first.tokens
    assert len(second.accept_lengths) < len(first.accept_lengths)
    talk.clear()
    again = finished(talk.ask([7, 9, 4], 30))
    assert again.tokens == first.tokens and again.prefilled == 3
    assert len(again.accept_lengths) < len(first.accept_lengths)
    fresh = jax.device_get(learner.params["buffers"]["adjacency"])
    assert not fresh.any()


def test_a_target_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="no tokenizer"):
        Conversation(toy_target())
