"""Conversations: what is read from every kind of file, and what is refused or skipped."""

import json

import pytest

from specjax.data.conversations import read_conversations

TURNS = [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?")]
OPENAI = {"messages": [{"role": role, "content": text} for role, text in TURNS]}
PEOPLE = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = {"id": "x", "conversations": [{"from": PEOPLE[r], "value": t} for r, t in TURNS]}
GOOD = [{"role": role, "content": text} for role, text in TURNS]


def write_lines(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_records(path, *rows):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row if isinstance(row, bytes) else json.dumps(row).encode())
    writer.close()
    return path


def test_both_styles_in_every_kind_of_file(tmp_path):
    write_lines(tmp_path / "a.jsonl", OPENAI, b"", SHAREGPT)
    (tmp_path / "b.json").write_text(json.dumps([SHAREGPT]))
    write_records(tmp_path / "c.array_record-00000-of-00001", OPENAI, SHAREGPT)
    (tmp_path / "notes.txt").write_text("not read")
    found, skipped = read_conversations(tmp_path)
    assert [list(c.messages) for c in found] == [GOOD] * 5 and skipped == []
    names = [c.name.removeprefix(str(tmp_path)) for c in found]
    shard = "/c.array_record-00000-of-00001"
    assert names == ["/a.jsonl:1", "/a.jsonl:3", "/b.json[0]", f"{shard}[0]", f"{shard}[1]"]
    assert read_conversations(tmp_path / "b.json")[0] == found[2:3]
    assert read_conversations(tmp_path, limit=2)[0] == found[:2]


def test_speakers_by_other_names_and_answers_to_nothing(tmp_path):
    row = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "gpt", "value": "cut off"},
            {"from": "prompter", "value": "Q"},
            {"from": "chatgpt", "value": "A"},
        ]
    }
    (conversation,), _ = read_conversations(write_lines(tmp_path / "a.jsonl", row))
    assert [(m["role"], m["content"]) for m in conversation.messages] == [
        ("system", "S"), ("user", "Q"), ("assistant", "A"),
    ]  # fmt: skip


def said(*pairs):
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


DAMAGED = {
    "not json": (b'{"messages": [', "not JSON"),
    "not utf-8": (b'{"messages": "\xff"}', "not UTF-8 text"),
    "no conversation": ({"text": "x"}, "'messages' or 'conversations'"),
    "a list": (b"[1]", "'messages' or 'conversations'"),
    "messages of another kind": ({"messages": ["a"]}, "a list of objects"),
    "a role that nobody has": (said(("robot", "x")), r"messages\[0\]\.role: 'robot'"),
    "a role that is no text": (said((["user"], "x")), r"messages\[0\]\.role"),
    "twice the same": (said(("user", "a"), ("user", "b")), r"messages\[1\].role: 'user'"),
    "nothing said": (said(("user", "a"), ("assistant", " ")), r"messages\[1\].content: empty"),
    "no question": (said(("assistant", "a")), "'user' expected in turn"),
    "a number": (said(("user", 3)), r"messages\[0\]\.content: 3, a string"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_refused_by_line_or_counted(tmp_path, kind):
    row, message = DAMAGED[kind]
    path = write_lines(tmp_path / "a.jsonl", OPENAI, row, SHAREGPT)
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}.*data\.skip_damaged"):
        read_conversations(path)
    found, skipped = read_conversations(path, skip_damaged=True)
    assert [list(c.messages) for c in found] == [GOOD, GOOD]
    assert len(skipped) == 1 and skipped[0].startswith(f"{path}:2: ")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.conversations: .*absent"):
        read_conversations(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl, \.json, \.array_record file"):
        read_conversations(tmp_path)
    with pytest.raises(ValueError, match=r"a\.parquet: one of"):
        read_conversations(write_lines(tmp_path / "a.parquet", OPENAI))
    with pytest.raises(ValueError, match=r"b\.json: a JSON list"):
        read_conversations(write_lines(tmp_path / "b.json", OPENAI))
    with pytest.raises(ValueError, match=r"c\.json: not JSON"):
        read_conversations(write_lines(tmp_path / "c.json", b"["))
    with pytest.raises(ValueError, match=r"d\.jsonl: no conversations \(1 damaged rows\)"):
        read_conversations(write_lines(tmp_path / "d.jsonl", b"x"), skip_damaged=True)


def test_a_damaged_record_is_named(tmp_path):
    path = write_records(tmp_path / "a.array_record", OPENAI, b"\xff")
    with pytest.raises(ValueError, match=r"a\.array_record\[1\]: not UTF-8"):
        read_conversations(path)
    path.write_bytes(b"no records at all")
    with pytest.raises(ValueError, match=r"a\.array_record: not an array_record file"):
        read_conversations(path)
