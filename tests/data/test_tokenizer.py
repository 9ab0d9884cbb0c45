import json
import pathlib
import random

import pytest

from specjax.data import corpora
from specjax.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, save_tokenizer, train_bpe

SHARED = pathlib.Path(__file__).resolve().parents[2].parent / "shared"
CODE = 'class A:\n    def f(self, x=1234567):\n        return "true"\n\n\ndef g():\n\treturn 0\n'


@pytest.fixture(scope="module")
def texts():
    return [corpora.stdlib_source(name) for name in ("textwrap", "heapq", "csv", "difflib")]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_bpe(texts, 1024)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "made"
    save_tokenizer(tokenizer, folder, model_max_length=512)
    return folder


def random_text(rng):
    ranges = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    chars = [chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randrange(40))]
    return "".join(rng.choice([char, "\n", "    ", "\r\n", "\t", "a", "1"]) for char in chars)


def test_any_unicode_survives_a_round_trip(tokenizer, folder):
    rng = random.Random(0)
    loaded = load_tokenizer(folder)
    for text in ["", " ", "\n", CODE, *(random_text(rng) for _ in range(500))]:
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0
        assert tokenizer.decode(ids[1:]) == text
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_and_size(tokenizer):
    assert [tokenizer.id_to_token(index) for index in (0, 1)] == list(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() == 1024
    assert tokenizer.encode("x", add_special_tokens=False).ids == tokenizer.encode("x").ids[1:]


def test_pieces_suit_code(tokenizer):
    tokens = tokenizer.encode(CODE, add_special_tokens=False).tokens
    space, line = "Ġ", "Ċ"
    assert line + 4 * space in tokens and line + 8 * space in tokens
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(CODE)]
    assert {3 * line, line + "ĉ", "Ġf", "(self", "123", "456", "7", "true"} < set(pieces)
    # A text cut at the end of a line is split as the whole text is.
    for cut in (index for index, char in enumerate(CODE) if char == "\n" and CODE[index - 1] > " "):
        head = tokenizer.encode(CODE[:cut], add_special_tokens=False).tokens
        assert tokens[: len(head)] == head


def test_training_is_deterministic(texts, tokenizer):
    assert train_bpe(texts, 1024).to_str() == tokenizer.to_str()


def test_own_special_tokens():
    tokenizer = train_bpe(["ab"], 259, special_tokens=("<s>", "</s>"))
    assert tokenizer.encode("ab").tokens[0] == "<s>"


def test_bad_training_arguments():
    with pytest.raises(ValueError, match="vocab_size: 257 is less than 258"):
        train_bpe(["a"], 257)
    with pytest.raises(ValueError, match="special_tokens: a begin and an end token"):
        train_bpe(["a"], 300, special_tokens=("<s>",))


def test_the_folder_is_a_hugging_face_folder(folder):
    from transformers import AutoTokenizer

    auto, own = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert auto(CODE)["input_ids"] == own(CODE)["input_ids"]
    assert (own.bos_token_id, own.eos_token_id, own.model_max_length) == (0, 1, 512)
    assert len(own) == 1024
    assert sorted(file.name for file in folder.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_code_in_a_folder_is_not_run(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, 64)
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n"
    )
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path)("a")["input_ids"] == tokenizer.encode("a").ids
    assert not (tmp_path / "ran").exists()


def test_bad_folders(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path, 64)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(tmp_path)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such_folder"):
        load_tokenizer(tmp_path / "no_such_folder")


@pytest.mark.parametrize("folder", ["stories260K/hf_derived", "tinystories-656K"])
def test_real_tokenizers(folder):
    models = SHARED / "data" / "models"
    path = models / folder
    if not path.is_dir():
        pytest.skip(f"{path} absent")
    golden = json.loads((models / folder.split("/")[0] / "golden_numpy.json").read_text())
    tokenizer = load_tokenizer(path)
    assert tokenizer(golden["prompt"])["input_ids"] == golden["prompt_ids"]
    text = tokenizer.decode(golden["greedy_ids"], skip_special_tokens=True)
    assert text.strip()[:200] == golden["greedy_text"].strip()[:200]
