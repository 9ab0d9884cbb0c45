"""What a benchmark's verdicts compare, and how close they let logits come."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from toys import greedy_continuations, toy_target

from configs import fasteagle
from experiments import compare
from specjax.evaluation import benchmark, exactness
from specjax.evaluation.benchmark import losslessness
from specjax.evaluation.lossless import TIE
from specjax.evaluation.spec_bench import read_answers
from specjax.sampling import Sampling
from specjax.verification import get_rule

PROMPTS = [[1, 2, 3, 4, 5], [5, 1, 8, 2, 6]]
GREEDY = Sampling()


@pytest.fixture(scope="module")
def target():
    return toy_target()


@pytest.fixture(scope="module")
def reference(target):
    """(prompt, greedy answer) pairs."""
    return list(zip(PROMPTS, greedy_continuations(target, PROMPTS, 12), strict=True))


def in_bfloat16(target):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), target.params)
    return dataclasses.replace(target, params=params)


@pytest.mark.parametrize("rule, sampling", [
    ("greedy", GREEDY), ("match", Sampling(1.0)), ("typical", Sampling(1.0)),
])  # fmt: skip
def test_the_tie_is_that_of_the_dtype(target, reference, monkeypatch, rule, sampling):
    """float32 has the fixed one, bfloat16 what rounding was measured to do; either is recorded."""
    rule = get_rule(rule)
    monkeypatch.setattr(exactness, "row_noise", lambda *_: 0.01)
    exact = losslessness(target, None, rule, sampling, reference, reference)
    assert exact["tie"] == TIE
    half = losslessness(in_bfloat16(target), None, rule, sampling, reference, reference)
    assert half["tie"] == 4 * 0.01
    # Nothing is out of reach of a tie this large: all that was refused is let pass.
    wrong = [(p, [(t + 1) % 12 for t in new]) for p, new in reference]
    monkeypatch.setattr(benchmark, "rounding_tie", lambda *_: (1e3, 0.0))
    loose = losslessness(target, None, rule, sampling, wrong, reference)
    assert loose["tie"] == 1e3
    if rule.name == "greedy":
        assert (loose["identical"], loose["ties"]) == (0, 2)


def test_only_answers_to_one_prompt_are_compared(target, reference):
    """A second turn after an answer that parted is another question."""
    rule, (first, second) = get_rule("greedy"), reference
    asked_otherwise = ([*second[0][:-1], 7], [3, 3])
    verdict = losslessness(target, None, rule, GREEDY, [first, asked_otherwise], [first, second])
    assert (verdict["checked"], verdict["identical"], verdict["ties"]) == (1, 1, 0)
    wrong = (second[0], [(second[1][0] + 1) % 12, *second[1][1:]])
    verdict = losslessness(target, None, rule, GREEDY, [first, wrong], [first, second])
    assert (verdict["checked"], verdict["identical"]) == (2, 1)


@pytest.fixture
def decoding(tmp_path, make_run, make_turn, monkeypatch):
    """A bench of two tasks at two temperatures, and the settings that were decoded, in order."""
    config = fasteagle.get_config("smoke")
    config.eval.tasks, config.eval.temperatures = ("a", "b"), (0.0, 0.5)
    done = []

    def decoded(target, methods, prompts, protocol, *_):
        setting = dict(task=protocol.task, temperature=protocol.sampling.temperature)
        if bench.stop_at == tuple(setting.values()):
            raise SystemExit(75)
        done.append(tuple(setting.values()))
        names = ("vanilla", "x/best")
        lengths = {"vanilla": (1, 1, 1), "x/best": (1, 2)}
        return [make_run([make_turn(i, lengths[n]) for i in prompts], n, **setting) for n in names]

    monkeypatch.setattr(compare, "benchmark", decoded)
    monkeypatch.setattr(compare, "sample", lambda *_: {})
    bench = SimpleNamespace(
        config=config, folder=tmp_path, target=SimpleNamespace(fingerprint="f"),
        tasks={"b": [5, 3], "a": [3]}, shapes={"a": None, "b": None}, stop_at=None,
    )  # fmt: skip
    return bench, done


def answer_files(folder):
    return {p.relative_to(folder).as_posix(): read_answers(p) for p in folder.rglob("*.jsonl")}


def test_a_method_has_one_file_of_answers_a_temperature(decoding):
    """Whatever the number of tasks; seeds have a folder each."""
    bench, _ = decoding
    rows, _ = compare.decode_all(bench, [], 0, "seed0")
    assert len(rows) == 8
    names = [f"{n}-temp-{t}" for n in ("vanilla", "x-best") for t in ("0.0", "0.5")]
    files = answer_files(bench.folder)
    assert sorted(files) == [f"answers/seed0/{name}.jsonl" for name in names]
    for answers in files.values():
        assert [row["question_id"] for row in answers] == ["b/3", "b/5", "a/3"]


def test_decoding_goes_on_where_it_was_stopped(decoding):
    """Rows and answers are those of a run that was not; another seed shares nothing."""
    bench, done = decoding
    whole, _ = compare.decode_all(bench, [], 0, "whole")
    order = [("b", 0.0), ("b", 0.5), ("a", 0.0), ("a", 0.5)]
    assert done == order
    done.clear()
    bench.stop_at = order[2]
    with pytest.raises(SystemExit):
        compare.decode_all(bench, [], 0, "seed0")
    assert done == order[:2]
    bench.stop_at = None
    rows, _ = compare.decode_all(bench, [], 0, "seed0")
    assert done == order and rows == whole
    files = answer_files(bench.folder)
    assert len(files) == 8
    for name, answers in files.items():
        if name.startswith("answers/seed0"):
            same = files[name.replace("seed0", "whole")]
            assert [a | {"tstamp": 0} for a in answers] == [a | {"tstamp": 0} for a in same]
    compare.decode_all(bench, [], 0, "seed0")
    assert done == order
    bench.config.eval.repeats += 1  # what it depends on has changed
    compare.decode_all(bench, [], 0, "seed0")
    assert done == order * 2
