"""Any tensorflow-datasets data set by name, prepared and read without TensorFlow."""

import json
import subprocess
import sys
import textwrap

import pytest

from specjax import processes
from specjax.data.conversations import read_conversations
from specjax.data.prompts import load_prompts
from specjax.data.tfds_source import TfdsName

tfds = pytest.importorskip("tensorflow_datasets")

TURNS = [("human", "One é?"), ("gpt", "1"), ("human", "Two?"), ("gpt", "2")]
EXPECTED = [
    {"role": {"human": "user", "gpt": "assistant"}[who], "content": text} for who, text in TURNS
]


class TinyTalk(tfds.core.GeneratorBasedBuilder):
    """Two rows with the same conversation in every form."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {
            "turns": tfds.features.Sequence({"from": text, "value": text}),
            "json": text,
            "question": text,
            "answer": text,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(2):
            yield (
                index,
                {
                    "turns": [{"from": who, "value": text} for who, text in TURNS],
                    "json": json.dumps(EXPECTED),
                    "question": "Q?",
                    "answer": "A",
                },
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyTalk(data_dir=str(folder)).download_and_prepare(file_format="array_record")
    return folder


@pytest.mark.parametrize("field", ["turns", "json"])
def test_conversations_in_both_forms(folder, field):
    found, _ = read_conversations(f"tfds:tiny_talk/train?field={field}", data_dir=folder)
    assert [list(c.messages) for c in found] == [EXPECTED] * 2
    assert found[1].name == "tfds:tiny_talk/train[1]"
    prompts = load_prompts(f"tfds:tiny_talk/train?field={field}", data_dir=folder)
    assert [p.turns for p in prompts] == [("One é?", "Two?")] * 2 and prompts[0].reference == "1"


def test_a_text_is_one_question_with_its_answer(folder):
    name = "tfds:tiny_talk:1.0.0/train[:1]?field=question&reference=answer"
    (conversation,), _ = read_conversations(name, data_dir=folder)
    assert [m["content"] for m in conversation.messages] == ["Q?", "A"]
    (prompt,) = load_prompts(name, data_dir=folder)
    assert (prompt.turns, prompt.reference) == (("Q?",), "A")
    assert load_prompts("tfds:tiny_talk/train?field=question", 1, folder)[0].reference is None


def test_what_is_not_there_is_named(folder, tmp_path):
    read = lambda name, where=folder: read_conversations(f"tfds:{name}", data_dir=where)  # noqa: E731
    with pytest.raises(ValueError, match=r"no field 'text', it has answer, json, question, turns"):
        read("tiny_talk/train?field=text")
    with pytest.raises(ValueError, match="split 'test' is none of train"):
        read("tiny_talk/test?field=turns")
    with pytest.raises(FileNotFoundError, match="tfds:no_such_set: no such data set in"):
        read("no_such_set/train?field=turns")
    for bad in ("tiny_talk?field=turns", "tiny_talk/train", "tiny_talk/train?column=turns"):
        with pytest.raises(ValueError, match=r"tfds:NAME/SPLIT\?field=FIELD"):
            read(bad)
    with pytest.raises(ValueError, match=r"train\[0\]: messages\[1\]\.content"):
        read("tiny_talk/train?field=question&reference=turns")


def test_a_set_that_cannot_be_prepared(tmp_path, monkeypatch):
    def no_network(self, manager):
        raise OSError("no network")

    monkeypatch.setattr(TinyTalk, "_split_generators", no_network)
    with pytest.raises(FileNotFoundError, match="tfds:tiny_talk: not in .*failed: no network"):
        read_conversations("tfds:tiny_talk/train?field=turns", data_dir=tmp_path)


def test_the_first_process_prepares_while_the_others_wait(tmp_path, monkeypatch):
    waiting, seen, prepare = [], [], TinyTalk.download_and_prepare

    def first(do):
        waiting.append(True)
        assert do() is None  # what the others are told
        waiting.clear()

    def preparing(self, **options):
        seen.append(bool(waiting))
        prepare(self, **options)

    monkeypatch.setattr(processes, "first", first)
    monkeypatch.setattr(TinyTalk, "download_and_prepare", preparing)
    for _ in range(2):
        found, _ = read_conversations("tfds:tiny_talk/train?field=turns", data_dir=tmp_path)
        assert len(found) == 2
    assert seen == [True]


def test_names():
    name = TfdsName.of("tfds:wiki/2023.en:1.0.0/train[:1%]?field=a&reference=b")
    assert name == TfdsName("wiki/2023.en:1.0.0", "train[:1%]", "a", "b")


def test_files_alone_are_enough(folder):
    """Another process, without the builder's class."""
    code = f"""
        from specjax.data.conversations import read_conversations
        found, _ = read_conversations("tfds:tiny_talk/train?field=turns", data_dir={str(folder)!r})
        assert len(found) == 2 and len(found[0].messages) == 4
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
