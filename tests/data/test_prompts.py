import ast
import importlib
import json
import pathlib
import sys

import pytest

from specjax.data import corpora, prompts, stdlib_prompts
from specjax.data.prompts import STDLIB_PROMPTS, Prompt, load_prompts, stdlib_training_prompts

DATA = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data" / "prompts"
ROW = {"question_id": 7, "category": "math", "turns": ["One?", "Two?"], "reference": ["1", "2"]}


@pytest.fixture(scope="module")
def evaluation():
    return load_prompts("stdlib")


@pytest.fixture(scope="module")
def training():
    return stdlib_training_prompts(120)


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets")


def write(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_manifest_yields_enough_held_out_prompts(evaluation):
    assert len(STDLIB_PROMPTS) == len(set(STDLIB_PROMPTS)) >= 100
    assert all(corpora.is_heldout(module) for module, _ in STDLIB_PROMPTS)
    assert len(evaluation) >= 80
    assert len({prompt.question_id for prompt in evaluation}) == len(evaluation)
    for category in ("function", "module"):
        assert sum(prompt.category == category for prompt in evaluation) >= 20


def test_prompts_are_the_librarys_text_with_its_continuation(evaluation):
    for (module, qualname), prompt in zip(STDLIB_PROMPTS, evaluation, strict=False):
        assert prompt.question_id == f"{module}.{qualname}".rstrip(".")
        (text,) = prompt.turns
        assert f"{text}\n{prompt.reference}" in corpora.stdlib_source(module)
        assert text == text.rstrip("\n") and 100 < len(text) < 4000
        assert prompt.reference.strip()


def test_a_function_prompt_ends_where_its_body_begins():
    source = corpora.stdlib_source("textwrap")
    index = STDLIB_PROMPTS.index(("textwrap", "indent"))
    (text,) = load_prompts("stdlib")[index].turns
    assert text.endswith('"""') and "def indent(text, prefix, predicate=None):" in text
    context = text[: text.index("def indent")]
    assert 0 < len(context) <= stdlib_prompts.CONTEXT_CHARS
    assert source[: source.index("def indent")].endswith(context)


def test_missing_modules_and_functions_are_skipped(monkeypatch):
    manifest = (("no_such_module", ""), ("heapq", "no_such_function"), ("heapq", "merge"))
    monkeypatch.setattr(stdlib_prompts, "STDLIB_PROMPTS", manifest)
    assert [prompt.question_id for prompt in load_prompts("stdlib")] == ["heapq.merge"]


def test_functions_of_every_shape():
    source = (
        "class A:\n    @property\n    def a(self):\n        # why\n        return 1\n"
        "    def b(self): return 2\n    def c(self):\n        '''Doc.'''\n"
        "    def d(self):\n        @wraps\n        def e(): pass\n        return e\n"
        "    def f(self): 'Doc.'; return 3\n"
    )
    lines = source.split("\n")
    found = dict(stdlib_prompts._functions(ast.parse(source)))
    assert list(found) == ["A.a", "A.d"]
    prompt = stdlib_prompts._function_prompt("m", "A.a", found["A.a"], lines)
    assert prompt.turns[0] == "class A:\n    @property\n    def a(self):"
    assert prompt.reference == "        # why\n        return 1"
    prompt = stdlib_prompts._function_prompt("m", "A.d", found["A.d"], lines)
    assert prompt.turns[0].endswith("    def d(self):")
    assert prompt.reference.startswith("        @wraps")


def test_training_prompts_are_deterministic_and_not_held_out(training, evaluation):
    assert load_prompts("stdlib-train", limit=40) == training[:40]
    assert stdlib_training_prompts(40, seed=1) != training[:40]
    assert len({prompt.turns for prompt in training}) == len(training) == 120
    assert {prompt.category for prompt in training} == {"function", "module"}
    assert not {prompt.turns for prompt in training} & {prompt.turns for prompt in evaluation}
    heldout = "\0".join(document.text for document in corpora.stdlib_documents("heldout"))
    assert not any(prompt.turns[0] in heldout for prompt in training)


def test_training_prompts_take_turns_and_run_out(monkeypatch):
    body = "".join(f"    x = {line}\n" for line in range(30))
    documents = [
        corpora.Document(name, "".join(f"def f{i}():\n{body}" for i in range(size)))
        for name, size in (("a", 1), ("b", 3))
    ]
    monkeypatch.setattr(stdlib_prompts, "stdlib_documents", lambda split: list(documents))
    first = stdlib_training_prompts(2)
    assert {prompt.question_id[0] for prompt in first} == {"a", "b"}
    assert stdlib_training_prompts(0) == []
    with pytest.raises(ValueError, match="count: 1000 prompts asked for, the library yields"):
        stdlib_training_prompts(1000)
    with pytest.raises(ValueError, match="count: -1 is negative"):
        stdlib_training_prompts(-1)


def test_rows_of_both_formats(tmp_path):
    file = write(tmp_path, ROW, {"question": "Q?", "answer": "A"}, {"turns": ["T"]})
    expected = [
        Prompt(7, "math", ("One?", "Two?"), "1\n2"),
        Prompt(1, "math", ("Q?",), "A"),
        Prompt(2, "", ("T",), None),
    ]
    assert load_prompts(file) == load_prompts(tmp_path) == load_prompts(str(file)) == expected
    assert load_prompts(file, limit=2) == expected[:2]
    assert load_prompts(file, limit=9) == expected


def test_names_under_a_data_dir(tmp_path):
    write(tmp_path / "eagle" / "sum", ROW)
    write(tmp_path / "mt_bench", ROW)
    assert load_prompts("sum", data_dir=tmp_path) == load_prompts("cnn_dm", data_dir=tmp_path)
    assert load_prompts("mt_bench", data_dir=tmp_path)[0].question_id == 7
    with pytest.raises(FileNotFoundError, match=r"'gsm8k': none of .*eagle/gsm8k/question\.jsonl"):
        load_prompts("gsm8k", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="data_dir: .*absent: no such folder"):
        load_prompts("gsm8k", data_dir=tmp_path / "absent")
    with pytest.raises(ValueError, match="data_dir: prompt set 'gsm8k' needs"):
        load_prompts("gsm8k")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"question\.jsonl: empty, no prompts"),
        ("\n \n", r"question\.jsonl: empty, no prompts"),
        ('{"turns": ["a"]}\n\nnot json\n', r"question\.jsonl:3: not JSON"),
        ('["a"]\n', r"question\.jsonl:1: a JSON object expected"),
        ('{"text": "a"}\n', r"question\.jsonl:1: no turns; .*found \['text'\]"),
        ('{"turns": []}\n', r"question\.jsonl:1: no turns"),
        ('{"turns": "a"}\n', r"question\.jsonl:1: no turns"),
        ('{"turns": ["a", " "]}\n', r"question\.jsonl:1: turns\[1\]: ' ' is no prompt"),
        ('{"turns": [3]}\n', r"question\.jsonl:1: turns\[0\]: 3 is no prompt"),
        ('{"question": ""}\n', r"question\.jsonl:1: turns\[0\]: '' is no prompt"),
        ('{"turns": ["a"], "question_id": []}\n', r"question\.jsonl:1: question_id: \[\]"),
        (
            2 * '{"turns": ["a"], "question_id": 7}\n',
            r"question\.jsonl:2: question_id: 7 is line 1's already",
        ),
    ],
)
def test_bad_prompt_files(tmp_path, text, message):
    (tmp_path / "question.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path)


def test_unknown_names_and_paths(tmp_path):
    for name in ("mtbench", "tfds:c4"):
        with pytest.raises(ValueError, match=f"'{name}' is no prompt set: stdlib, .*tfds:gsm8k"):
            load_prompts(name)
    for path in (tmp_path, tmp_path / "no.jsonl"):
        with pytest.raises(FileNotFoundError, match="no such prompt file"):
            load_prompts(path)
    with pytest.raises(ValueError, match="limit: 0"):
        load_prompts("stdlib", limit=0)


def test_conversations_give_their_first_question(tmp_path):
    folder = tmp_path / "sharegpt"
    folder.mkdir()
    turns = lambda *pairs: {"conversations": [{"from": a, "value": b} for a, b in pairs]}  # noqa: E731
    rows = [
        turns(("human", "one?"), ("gpt", "1")),
        turns(("gpt", "cut"), ("human", "two?")),
        turns(("gpt", "nobody asks")),
    ]
    (folder / "a.json").write_text(json.dumps(rows))
    line = json.dumps({"messages": [{"role": "user", "content": "three?"}]})
    (folder / "b.jsonl").write_text(line + "\n")
    loaded = load_prompts("sharegpt", data_dir=tmp_path)
    assert [p.turns for p in loaded] == [("one?",), ("two?",), ("three?",)]
    assert len({p.question_id for p in loaded}) == 3
    assert len(load_prompts("sharegpt", limit=2, data_dir=tmp_path)) == 2
    (folder / "a.json").write_text(json.dumps(rows[2:]))
    (folder / "b.jsonl").unlink()
    with pytest.raises(ValueError, match="no conversation in which a user asks"):
        load_prompts("sharegpt", data_dir=tmp_path)
    (folder / "a.json").write_text('[{"messages": [7]}]')
    with pytest.raises(ValueError, match=r"a\.json\[0\]: conversation: .*a list of objects"):
        load_prompts("sharegpt", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="ultrachat"):
        load_prompts("ultrachat", data_dir=tmp_path)


@pytest.mark.parametrize("name", prompts.LOCAL_SETS)
def test_real_prompt_files(name):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} absent")
    loaded = load_prompts(name, data_dir=DATA)
    assert len(loaded) in (79, 80, 480)
    assert len({prompt.question_id for prompt in loaded}) == len(loaded)
    if name == "mt_bench":
        assert all(len(prompt.turns) == 2 for prompt in loaded)


def test_real_gsm8k_training_rows():
    file = DATA / "gsm8k" / "train.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} absent")
    assert load_prompts(file, limit=3)[2].reference.splitlines()[-1].startswith("####")


def prepared_by_hand(monkeypatch, module, class_name, rows):
    """Lets a tensorflow-datasets builder make `rows` its test split, in place of downloading."""
    builder = getattr(importlib.import_module(module), class_name)
    monkeypatch.setattr(builder, "_split_generators", lambda self, _: {"test": enumerate(rows)})


def test_tfds_gsm8k(tfds, tmp_path, monkeypatch):
    keys = ("question", "answer", "annotation", "short_answer")
    rows = [{key: f"{key} {index} é" for key in keys} for index in range(3)]
    prepared_by_hand(monkeypatch, prompts.TFDS_SETS["gsm8k"].module, "Gsm8k", rows)
    loaded = load_prompts("tfds:gsm8k", data_dir=tmp_path)
    assert {(prompt.turns, prompt.reference) for prompt in loaded} == {
        ((row["question"],), row["answer"]) for row in rows
    }
    assert [(prompt.question_id, prompt.category) for prompt in loaded] == [
        (index, "math") for index in range(3)
    ]
    monkeypatch.undo()  # prepared now: nothing is downloaded any more
    assert load_prompts("tfds:gsm8k", limit=2, data_dir=tmp_path) == loaded[:2]


def test_tfds_cnn_dailymail(tfds, tmp_path, monkeypatch):
    row = {"article": "Long text.", "highlights": "Short.", "publisher": "cnn", "id": "1"}
    module = prompts.TFDS_SETS["cnn_dailymail"].module
    prepared_by_hand(monkeypatch, module, "CnnDailymail", [row])
    (prompt,) = load_prompts("tfds:cnn_dailymail", data_dir=tmp_path)
    assert prompt == Prompt(0, "summarization", ("Summarize: Long text.",), "Short.")


def test_tfds_data_that_cannot_be_prepared_or_read(tfds, tmp_path, monkeypatch):
    def no_network(self, _):
        raise OSError("no network")

    module = importlib.import_module(prompts.TFDS_SETS["gsm8k"].module)
    monkeypatch.setattr(module.Gsm8k, "_split_generators", no_network)
    with pytest.raises(FileNotFoundError, match="tfds:gsm8k: not in .*gsm8k.* failed: no network"):
        load_prompts("tfds:gsm8k", data_dir=tmp_path)
    rows = [dict.fromkeys(("question", "answer", "annotation", "short_answer"), "x")]
    prepared_by_hand(monkeypatch, prompts.TFDS_SETS["gsm8k"].module, "Gsm8k", rows)
    load_prompts("tfds:gsm8k", data_dir=tmp_path)
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="tfds:gsm8k: .*array_record files expected"):
        load_prompts("tfds:gsm8k", data_dir=tmp_path)


def test_tfds_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="tfds:gsm8k: tensorflow-datasets"):
        load_prompts("tfds:gsm8k")
