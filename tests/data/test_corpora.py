import ast
import json

import numpy as np
import pytest

from specjax.data import corpora
from specjax.data.corpora import HELDOUT_MODULES, Document, local_documents, pack_tokens
from specjax.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def splits():
    return {split: corpora.stdlib_documents(split) for split in corpora.SPLITS}


def names(documents):
    return [document.name for document in documents]


def test_splits_are_disjoint_and_make_up_the_whole(splits):
    train, heldout = set(names(splits["train"])), set(names(splits["heldout"]))
    assert not train & heldout
    assert sorted(train | heldout) == names(splits["all"])
    assert len(HELDOUT_MODULES) == len(set(HELDOUT_MODULES))
    assert heldout == set(HELDOUT_MODULES)


def test_held_out_texts_are_not_in_train(splits):
    train = {document.text for document in splits["train"]}
    assert not any(document.text in train for document in splits["heldout"])


def test_a_held_out_package_holds_out_its_submodules(monkeypatch):
    monkeypatch.setattr(corpora, "HELDOUT_MODULES", ("json",))
    assert corpora.is_heldout("json") and corpora.is_heldout("json.tool")
    assert not corpora.is_heldout("jsonx")
    heldout = corpora.stdlib_documents("heldout")
    assert {"json", "json.decoder", "json.encoder"} <= set(names(heldout))
    assert not any(name.startswith("json") for name in names(corpora.stdlib_documents("train")))


def test_a_module_that_this_python_lacks_is_skipped(monkeypatch):
    monkeypatch.setattr(corpora, "HELDOUT_MODULES", ("heapq", "no_such_module"))
    assert names(corpora.stdlib_documents("heldout")) == ["heapq"]
    assert corpora.stdlib_source("no_such_module") is None
    assert "def heappush" in corpora.stdlib_source("heapq")


def test_library_is_large_sorted_clean_code(splits):
    documents = splits["all"]
    assert sum(len(document.text) for document in documents) > 5e6
    assert sum(len(document.text) for document in splits["heldout"]) > 5e5
    assert names(documents) == sorted(set(names(documents)))
    assert not any("\r" in document.text for document in documents)
    parts = {part for name in names(documents) for part in name.split(".")}
    assert not parts & {"test", "tests", "idle_test", "turtledemo", "ensurepip"}
    for document in splits["heldout"]:
        ast.parse(document.text)


def test_tables_are_left_out(splits):
    assert corpora.is_table("x = {\n    'a': 1,\n    'b': 2,\n    'c': 3,\n}\n")
    assert corpora.is_table("t = (\n    0x01, 0x02,\n    -3, 4,\n    [1, 2],\n)\n")
    assert not corpora.is_table('def f():\n    """Text."""\n    return "a"\n')
    left = set(names(splits["all"]))
    assert "encodings.cp037" not in left and "html.entities" not in left
    assert {"os", "typing", "encodings.idna"} <= left


def test_unknown_split():
    with pytest.raises(ValueError, match="split: 'test' is not one of train, heldout, all"):
        corpora.stdlib_documents("test")


def test_missing_library_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        corpora.stdlib_documents("train")


def test_local_files_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree é\n".encode())
    (tmp_path / "b.json").write_text(json.dumps(["x", "y"]))
    rows = [{"text": "z"}, {"conversations": [{"from": "human", "value": "hi"}]}, {"messages": []}]
    (tmp_path / "c.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.py").write_text("pass\n")
    documents = local_documents(tmp_path)
    texts = [document.text for document in documents]
    assert texts == ["one\ntwo\nthree é\n", "x", "y", "z", *map(json.dumps, rows[1:]), "pass\n"]
    assert [name.removeprefix(str(tmp_path)) for name in names(documents)][1:4] == [
        "/b.json[0]",
        "/b.json[1]",
        "/c.jsonl:1",
    ]
    assert local_documents(tmp_path / "a.txt") == documents[:1]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: a JSON object expected, not a list"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: 'text' .* expected, found \['body'\]"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' \(a string\)"),
        ("a.json", b'["x",\n "y"', r"a\.json:2: not JSON"),
        ("a.json", b'{"x": 1}', r"a\.json: a JSON list of strings or rows expected, not an object"),
        ("a.json", b'["x", 3]', r"a\.json\[1\]: a string or an object expected, not int"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8"),
        ("a.bin", b"x", r"a\.bin: one of \.txt"),
    ],
)
def test_bad_local_files(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        local_documents(tmp_path / file)


def test_missing_and_empty_local_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        local_documents(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no .txt, .py"):
        local_documents(tmp_path)


def test_packing_joins_documents_in_order():
    documents = [Document(str(index), "ab " * index) for index in range(150)]
    tokenizer = train_bpe([document.text for document in documents], 260)
    stream = pack_tokens(documents, tokenizer, bos_id=0, eos_id=1)
    assert stream.dtype == np.int32 and stream.ndim == 1
    assert (stream == 0).sum() == (stream == 1).sum() == 150
    ends = np.flatnonzero(stream == 1)
    starts = np.concatenate([[0], ends[:-1] + 1])
    assert (stream[starts] == 0).all()
    texts = [tokenizer.decode(stream[s + 1 : e]) for s, e in zip(starts, ends, strict=True)]
    assert texts == [document.text for document in documents]
    assert pack_tokens([], tokenizer, 0, 1).shape == (0,)
