"""What a benchmark asks and shows, without decoding anything."""

import types

import pytest
from transformers import PreTrainedTokenizerFast

from specjax.data.tokenizer import train_bpe
from specjax.evaluation.benchmark import cut_left, shaded_pieces

BOS = 0


@pytest.mark.parametrize("ids", [[], [BOS], [7], [BOS, 1, 2, 3], [4, 1, 2, 3]], ids=str)
def test_the_last_tokens_are_kept_and_bos(ids):
    for most in range(1, 7):
        kept = cut_left(ids, most, BOS)
        begins = ids[:1] == [BOS]
        assert len(kept) == min(len(ids), most)
        assert kept[begins:] == ids[len(ids) - len(kept) + begins :]
        assert kept[:begins] == ids[:begins]
    assert cut_left(ids, 0, BOS) == ids


def test_pieces_are_the_whole_answer_by_depth(make_turn):
    bpe = train_bpe(["def main():\n"], 290)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bpe.id_to_token(0), eos_token=bpe.id_to_token(1)
    )
    target = types.SimpleNamespace(tokenizer=tokenizer)
    ids = tokenizer.encode("def é ☃ naïve ☃", add_special_tokens=False)
    for count in range(1, len(ids) + 1):  # most end inside a character
        pieces = shaded_pieces(target, make_turn(1, [1] * count, tokens=ids[:count]))
        assert "".join(text for text, _ in pieces) == tokenizer.decode(ids[:count])
    ids = [*tokenizer.encode("xyz ab", add_special_tokens=False), tokenizer.eos_token_id]
    pieces = shaded_pieces(target, make_turn(1, (1, 3, 2, 1), tokens=ids))
    assert pieces == [("x", 0), ("y", 1), ("z", 2), (" ", 0), ("a", 1), ("b", 0)]
