"""Training sequences: prompts continued by the target itself, cached on disk."""

import functools
import hashlib
import json
import pathlib

import numpy as np

from specjax import decoding, processes
from specjax.files import write_npz
from specjax.generation import collect, make_engine, start
from specjax.models.target import Target
from specjax.preemption import stop_if_due
from specjax.progress import progress, say
from specjax.sampling import Sampling


def _key(target: Target, prompts, settings: dict) -> str:
    content = json.dumps([target.fingerprint, prompts, settings]).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def regenerate(
    target: Target,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch: int,
    folder: pathlib.Path,
) -> list[tuple[list[int], int]]:
    """(token ids, prompt length) of every prompt continued by the target.

    Batches are decoded in order of prompt length and cached one file each, so an interrupted run
    goes on where it stopped; a finished one is read back. The cache key covers the target's
    weights, the prompts and the settings.
    """
    settings = {"new": max_new_tokens, "temperature": temperature, "seed": seed, "batch": batch}
    folder = pathlib.Path(folder) / _key(target, prompts, settings)
    groups = by_length(prompts, batch)
    engine, params = make_engine(target, None, Sampling(temperature))
    result: list = [None] * len(prompts)
    there = lambda g: (folder / f"{g}.npz").is_file()  # noqa: E731
    todo = processes.first(lambda: [g for g in range(len(groups)) if not there(g)])
    if not todo:
        say(f"data: {len(prompts)} continuations read from {folder}")
    written = sorted(set(range(len(groups))) - set(todo))
    new = processes.together(lambda: {g: read_batch(folder / f"{g}.npz") for g in written})
    with progress("regenerate", len(groups), len(written)) as advance:
        for g in todo:
            rows = [prompts[i] for i in groups[g]]
            new[g] = continued(engine, params, rows, max_new_tokens, seed + g, batch)
            processes.first(functools.partial(write_batch, folder / f"{g}.npz", new[g]))
            advance()
            stop_if_due(f"{len(new)} of {len(groups)} batches of text written")
    for g, members in enumerate(groups):
        for i, tokens in zip(members, new[g], strict=True):
            result[i] = (prompts[i] + tokens, len(prompts[i]))
    return result


def write_batch(path, new: list[list[int]]) -> None:
    """The new tokens of one batch as a file."""
    write_npz(path, tokens=np.concatenate(new), lengths=[len(tokens) for tokens in new])


def read_batch(path) -> list[list[int]]:
    """What `write_batch` wrote."""
    with np.load(path) as stored:
        pieces = np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1])
    return [piece.tolist() for piece in pieces]


def by_length(prompts, batch: int) -> list[list[int]]:
    """Indices of prompts in groups of at most `batch`, the shortest first."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def continued(engine, params, prompts, max_new_tokens, seed, batch) -> list[list[int]]:
    """New tokens of at most `batch` prompts, decoded together at one compiled shape."""
    filled = prompts + prompts[:1] * (batch - len(prompts))
    state = start(engine, params, filled, max_new_tokens, seed=seed)
    new, _ = collect(decoding.run_host(engine, params, state))
    return new[: len(prompts)]
