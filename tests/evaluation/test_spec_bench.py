"""Answer files: the format's fields by hand, and comparers that see what equal.py does not."""

import json

import numpy as np
import pytest

from specjax.evaluation.spec_bench import (
    answers_name,
    compare_answers,
    read_answers,
    speed,
    write_answers,
)


@pytest.fixture
def answers(tmp_path, make_run):
    """Writes turns as an answer file and reads them back."""

    def make(turns, name="answers"):
        path = tmp_path / f"{name}.jsonl"
        write_answers(path, [make_run(turns)], "specjax-fasteagle-temp-0.0", timestamp=1.79e9)
        return read_answers(path)

    return make


def test_a_row_by_hand(answers, make_turn):
    second = make_turn(81, (1, 5), (4.0,), turn=1, text="höher")
    first = make_turn(81, (1, 3, 2), (1.0, 9.0, 2.0), turn=0, text="a\nb")
    (row,) = answers([second, first])
    assert len(row.pop("answer_id")) == 22
    assert row == {
        "question_id": 81,
        "category": "coding",
        "model_id": "specjax-fasteagle-temp-0.0",
        "choices": [
            {
                "index": 0,
                "turns": ["a\nb", "höher"],
                "decoding_steps": [2, 1],
                "new_tokens": [6, 6],
                "wall_time": [2.0, 4.0],
                "accept_lengths": [3, 2, 5],
                "tokens": [list(range(6)), list(range(6))],
            }
        ],
        "tstamp": 1.79e9,
    }


def test_rows_are_sorted_and_stable(tmp_path, answers, make_turn):
    rows = answers([make_turn(question) for question in (10, 9, 100, 1)])
    assert [row["question_id"] for row in rows] == [1, 9, 10, 100]
    assert answers([make_turn(question) for question in (1, 9, 10, 100)]) == rows
    assert (tmp_path / "answers.jsonl").read_text().count("\n") == 4
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("second, ids", [
    ((10, 4, 7), [2, 3, 4, 7, 10]),  # own ids keep their numbers, tasks in the run's order
    ((10, 4, 2), ["b/2", "b/3", "a/2", "a/4", "a/10"]),
])  # fmt: skip
def test_tasks_share_a_file_and_no_id(tmp_path, make_run, make_turn, second, ids):
    runs = [
        make_run([make_turn(i, tokens=range(9), accept_lengths=(1, 8)) for i in (3, 2)], task="b",
                 depth=7),
        make_run([make_turn(i) for i in second], task="a"),
    ]  # fmt: skip
    write_answers(tmp_path / "x.jsonl", runs, "m", timestamp=0.0)
    rows = read_answers(tmp_path / "x.jsonl")
    assert [row["question_id"] for row in rows] == ids
    assert [row["choices"][0]["new_tokens"] for row in rows] == [[9], [9], [6], [6], [6]]
    assert len({row["answer_id"] for row in rows}) == 5


@pytest.mark.parametrize("seed", range(5))
def test_lists_agree_with_each_other_and_with_tau(answers, simulate, seed):
    from specjax.evaluation.statistics import tau

    turns = simulate(np.random.default_rng(seed), [0.8, 0.5, 0.3], turns=2)
    rows = answers(turns)
    choices = [row["choices"][0] for row in rows]
    for choice in choices:
        assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
        assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"]) - len(choice["turns"])
    flat = [length for choice in choices for length in choice["accept_lengths"]]
    assert np.mean(flat) == pytest.approx(tau(turns))
    assert speed(rows, rows).mean_accepted_tokens == pytest.approx(tau(turns))


def test_names_hold_no_slash():
    assert answers_name("fasteagle/best", 0) == "fasteagle-best-temp-0.0.jsonl"
    assert answers_name("vanilla", 0.7) == "vanilla-temp-0.7.jsonl"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "Expecting value"),
        ('{"question_id": 2, "cat', "Unterminated string"),
        ("[1]", "not a JSON object"),
        ('{"question_id": 2}', "lacks category"),
        ('{"question_id": [2], "category": "", "choices": [{}]}', "neither"),
        ('{"question_id": 2, "category": "", "choices": []}', "choices is empty"),
        ('{"question_id": 2, "category": "", "choices": [{}]}', "lacks the list turns"),
        ("SAME", "question_id 1 is in line 1 too"),
        ("TIMES", "1 turns, but 2 wall_time"),
        ("ZERO", "wall_time is not positive"),
        ("\udcff", "invalid start byte"),
    ],
)
def test_reading_names_file_and_line(tmp_path, answers, make_turn, line, message):
    (good,) = answers([make_turn(1)])
    choice = good["choices"][0]
    line = {
        "SAME": json.dumps(good),
        "TIMES": json.dumps(good | {"choices": [choice | {"wall_time": [1.0, 1.0]}]}),
        "ZERO": json.dumps(good | {"choices": [choice | {"wall_time": [0.0]}]}),
    }.get(line, line)
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{line}\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as error:
        read_answers(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_reading_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: no answers"):
        read_answers(tmp_path / "empty.jsonl")


def test_strict_sees_what_the_scripts_miss(answers, make_turn):
    whole = answers([make_turn(question) for question in range(6)])
    one = whole[:1]
    renamed = [row | {"question_id": row["question_id"] + 50} for row in whole]
    for other, differences in ((one, 5), (renamed, 12)):
        assert compare_answers(whole, other, mode="spec_bench").equal
        strict = compare_answers(whole, other)
        assert not strict.equal and len(strict.differences) == differences
    assert str(compare_answers(whole, one).differences[0]) == "question 1: only in the first"


def test_strict_finds_the_first_differing_token(answers, make_turn):
    left = answers([make_turn(1, tokens=(5, 6, 7, 8, 9, 9), text="same")])
    right = answers([make_turn(1, tokens=(5, 6, 7, 3, 9, 1), text="same")])
    (difference,) = compare_answers(left, right).differences
    assert (difference.turn, difference.position) == (0, 3)
    assert str(difference) == "question 1, turn 0, position 3: tokens differ"
    assert compare_answers(left, right, mode="spec_bench").equal


def test_strict_finds_a_longer_answer_with_the_same_text(answers, make_turn):
    left = answers([make_turn(1, (1, 3), text="same"), make_turn(1, (1, 2), turn=1, text="x")])
    right = answers([make_turn(1, (1, 3), text="same"), make_turn(1, (1, 3), turn=1, text="x")])
    (difference,) = compare_answers(left, right).differences
    assert difference.reason == "3 and 4 new tokens"
    assert (difference.turn, difference.position) == (1, 3)


def test_strict_compares_texts_of_files_without_tokens(answers, make_turn):
    left, right = answers([make_turn(1, text="abcd")]), answers([make_turn(1, text="abXd")])
    assert not compare_answers(left, right, mode="spec_bench").equal
    assert compare_answers(left, right).equal  # the tokens are equal, and they decide
    del left[0]["choices"][0]["tokens"]
    assert compare_answers(left, right).differences[0].position == 2
    right[0]["choices"][0]["turns"].append("more")
    assert compare_answers(left, right).differences[0].reason == "1 and 2 turns"


def test_speed_in_both_conventions(answers, make_turn):
    ours = answers([make_turn(1, (1, 4, 5), (1.0,)), make_turn(2, (1, 4, 5), (10.0,))])
    base = answers([make_turn(1, (1, 4, 5), (10.0,)), make_turn(2, (1, 4, 5), (10.0,))])
    strict, published = speed(ours, base), speed(ours, base, mode="spec_bench")
    assert strict.speedup == pytest.approx(20 / 11)
    assert published.tokens_per_s == pytest.approx((10 + 1) / 2)
    assert published.speedup == pytest.approx(5.5)
    assert speed(ours, base[:1], mode="spec_bench").baseline_tokens_per_s == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"one file only: \[2\]"):
        speed(ours, base[:1])
    for function in (speed, compare_answers):
        with pytest.raises(ValueError, match="mode is 'fast'"):
            function(ours, base, mode="fast")
