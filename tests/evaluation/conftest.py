"""Invented records, so that statistics and reports are tested without decoding anything."""

import numpy as np
import pytest

from specjax.evaluation.records import MethodRun, TurnRecord


@pytest.fixture
def make_turn():
    def make(question, accept_lengths=(1, 3, 2), seconds=(1.0,), turn=0, tokens=None, text=None):
        tokens = tuple(range(sum(accept_lengths))) if tokens is None else tuple(tokens)
        text = " ".join(map(str, tokens)) if text is None else text
        lengths = tuple(accept_lengths)
        return TurnRecord(question, "coding", turn, tokens, text, lengths, tuple(seconds))

    return make


@pytest.fixture
def make_run():
    def make(turns, method="fasteagle", **changes):
        vanilla = method == "vanilla"
        fields = {
            "task": "builtin",
            "temperature": 0.0,
            "seed": 0,
            "batch": 1,
            "rule": "greedy",
            "exact": True,
            "nodes": 1 if vanilla else 8,
            "depth": 0 if vanilla else 7,
            "draft_ms": 0.0 if vanilla else 0.5,
            "verify_ms": 4.0,
            "round_ms": 4.0 if vanilla else 5.0,
            "drafter_parameters": 0 if vanilla else 2_100_000,
            "train_tokens": 0 if vanilla else 100_000,
            "train_seconds": 0.0 if vanilla else 12.5,
            "lossless": {"kind": "identical", "checked": 8, "identical": 8, "ties": 0},
        }
        return MethodRun(method=method, turns=list(turns), **(fields | changes))

    return make


@pytest.fixture
def simulate(make_turn):
    """Answers of a chain drafter whose draft token at depth i is accepted with `shares[i - 1]`."""

    def run(generator, shares, questions=12, limit=60, noise=0.1, turns=1, prompt_noise=0.0):
        answers = []
        for question in range(questions):
            slowness = np.exp(prompt_noise * generator.normal())
            for turn in range(turns):
                kept = generator.random((limit, len(shares))) < np.array(shares)
                emitted = 1 + np.cumprod(kept, axis=1).sum(axis=1)
                total = 1 + np.cumsum(emitted)
                cut = int(np.argmax(total >= limit))
                lengths = [1, *emitted[: cut + 1].tolist()]
                lengths[-1] -= int(total[cut]) - limit
                seconds = slowness * len(lengths) * (1 + noise * generator.random(3))
                answers.append(make_turn(question, lengths, seconds, turn))
        return answers

    return run


@pytest.fixture
def make_rows(make_run, simulate):
    """Result rows of vanilla and two drafters, for each of `tasks` and `temperatures`."""
    from specjax.evaluation.results import result_row

    def make(tasks=("builtin",), temperatures=(0.0,), methods=("eagle3", "fasteagle"), **changes):
        generator, rows = np.random.default_rng(0), []
        for task in tasks:
            for temperature in temperatures:
                where = {"task": task, "temperature": temperature}
                vanilla = make_run(simulate(generator, []), "vanilla", **where)
                rows.append(result_row(vanilla, vanilla, 4.0))
                for method in methods:
                    turns = simulate(generator, [0.8, 0.6, 0.5])
                    run = make_run(turns, method, depth=3, **where, **changes)
                    rows.append(result_row(run, vanilla, 4.0, bootstrap=50))
        return rows

    return make


@pytest.fixture
def header():
    return {
        "target": {
            "name": "builtin",
            "parameters": 15_000_000,
            "layers": 16,
            "hidden_size": 256,
            "vocab_size": 8192,
        },
        "device": "cpu, 2 cores",
        "dtype": "float32",
        "versions": {"specjax": "0.1.0"},
        "seed": 0,
        "preset": "",
    }
