"""Decodes the same prompts with every method in one process, interleaved, and times them."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from specjax import decoding
from specjax.data.prompt_files import Prompt
from specjax.data.templates import encode_chat, encode_prompt, turn_messages
from specjax.evaluation.lossless import distribution_verdict, identical_verdict, lossy_verdict
from specjax.evaluation.records import MethodRun, TurnRecord
from specjax.evaluation.timing import RoundTimes, count_flops, time_round
from specjax.generation import bucket, cache_slots, collect, make_engine, start
from specjax.models.target import Target
from specjax.profiling import traced
from specjax.progress import progress
from specjax.sampling import Sampling
from specjax.trained import TrainedDrafter
from specjax.training.drafter import TrainingCost


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """One contender: a name for the table, a drafter (None: vanilla) and what training it cost."""

    name: str
    drafter: TrainedDrafter | None = None
    cost: TrainingCost = TrainingCost(0, 0.0)
    rule: str | None = None


VANILLA = Method("vanilla")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all methods share in one benchmark."""

    task: str
    sampling: Sampling
    max_new_tokens: int
    repeats: int = 1
    seed: int = 0
    batch: int = 1
    max_prompt_tokens: int = 0  # keep only the last ones, 0 = all
    chat_template: str | None = None  # None: plain text, "": the tokenizer's own, else a name


def prompt_ids(target: Target, prompt: Prompt, answers: Sequence[str], protocol: Protocol):
    """Token ids of the next turn of a prompt, given the answers so far."""
    if protocol.chat_template is None:
        pieces = [t for pair in zip(prompt.turns, answers, strict=False) for t in pair]
        text = "\n".join([*pieces, prompt.turns[len(answers)]])
        ids = encode_prompt(target.tokenizer, text)
    else:
        messages = turn_messages(prompt.turns, answers)
        template = protocol.chat_template or None
        ids = encode_chat(target.tokenizer, messages, template=template)
    limit = protocol.max_prompt_tokens
    if limit and len(ids) > limit:
        head = ids[:1] if ids[0] == target.config.bos_token_id else []
        ids = head + ids[len(ids) - limit + len(head) :]
    return ids


class Runner:
    """One method under one protocol: compiled once, then called prompt by prompt."""

    def __init__(self, target: Target, method: Method, protocol: Protocol, slots: int, length: int):
        self.method, self.protocol, self.slots, self.length = method, protocol, slots, length
        self.drafter = method.drafter
        self.engine, self.params = make_engine(
            target, method.drafter, protocol.sampling, rule=method.rule
        )

    def _start(self, rows: list[list[int]], first_request: int = 0):
        return start(
            self.engine, self.params, rows, self.protocol.max_new_tokens, self.protocol.seed,
            self.slots, self.length, first_request,
        )  # fmt: skip

    def decode(self, rows: list[list[int]], first_request: int = 0):
        """(tokens, accept lengths, seconds, drafter afterwards) of one batch, prefill included."""
        started = time.perf_counter()
        state = decoding.run_host(self.engine, self.params, self._start(rows, first_request))
        tokens, accepts = collect(state)
        after = None if self.drafter is None else self.drafter.after(state)
        return tokens, accepts, time.perf_counter() - started, after

    def keep(self, drafter) -> None:
        """Goes on with what the drafter has learnt from a batch that was decoded."""
        if drafter is not self.drafter:
            self.drafter, self.params = drafter, self.params | {"drafter": drafter.params}

    def round_costs(self, batches: list[list[list[int]]], repeats: int):
        """(median times over states a few rounds into each batch, flops of the draft and verify)"""
        times = []
        for rows in batches:
            state = self._start(rows)
            for _ in range(3):
                state = decoding.jit_round(self.engine, self.params, state)
            times.append(time_round(self.engine, self.params, state, repeats))
        with traced(f"decode/{self.method.name}") as rounds:  # after all that is timed
            for _ in range(rounds):
                state = decoding.jit_round(self.engine, self.params, state)
            jax.block_until_ready(state.lengths_B)
        draft, verify, whole = np.median([dataclasses.astuple(t) for t in times], axis=0)
        times = RoundTimes(0.0 if self.method.drafter is None else draft, verify, whole)
        return times, count_flops(self.engine, self.params, state)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Cache slots and padded prompt length shared by all methods: one prefill to compile."""

    slots: int = 0
    length: int = 0


def shared_shapes(target: Target, methods: Sequence[Method], prompts, protocol) -> Shapes:
    """Shapes that suit every method, so that all of them read caches of one size."""
    ids = [prompt_ids(target, p, [], protocol) for p in prompts]
    longest = max(map(len, ids))
    # Later turns hold the whole conversation so far.
    if max(len(p.turns) for p in prompts) > 1:
        longest += protocol.max_new_tokens + longest
    longest = min(longest, target.config.max_position_embeddings)
    engines = [make_engine(target, m.drafter)[0] for m in methods]
    slots = max(cache_slots(e, longest, protocol.max_new_tokens) for e in engines)
    return Shapes(slots, bucket(max(map(len, ids))))


def benchmark(
    target: Target,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    protocol: Protocol,
    timing_repeats: int = 15,
    shapes: Shapes | None = None,
) -> list[MethodRun]:
    """Runs every method on every prompt; vanilla is added in front if it is missing.

    Methods take turns on each batch of prompts, so that a slow spell of the machine hits them
    alike. Everything is compiled on the first batch of each padded shape before it is timed;
    `shapes` (default: what these methods and prompts need) let it share earlier compilations.

    Raises:
      ValueError: no prompts, or a prompt that does not fit the context.
    """
    if not prompts:
        raise ValueError(f"task {protocol.task!r}: there are no prompts")
    if not any(m.drafter is None for m in methods):
        methods = [VANILLA, *methods]
    turns = max(len(p.turns) for p in prompts)
    answers: dict = {(m.name, p.question_id): [] for m in methods for p in prompts}
    shapes = shapes or shared_shapes(target, methods, prompts, protocol)
    slots, length = shapes.slots, shapes.length
    runners = [Runner(target, m, protocol, slots, length) for m in methods]
    records: dict = {m.name: [] for m in methods}
    asked: dict = {m.name: [] for m in methods}
    warm, total = set(), sum(len(p.turns) for p in prompts) * len(methods)
    label = f"decode {protocol.task} T={protocol.sampling.temperature:g}"
    groups = []
    with progress(label, total) as advance:
        for turn in range(turns):
            live = [p for p in prompts if len(p.turns) > turn]
            for first in range(0, len(live), protocol.batch):
                group = live[first : first + protocol.batch]
                for runner in runners:
                    name = runner.method.name
                    rows = [
                        prompt_ids(target, p, answers[name, p.question_id], protocol) for p in group
                    ]
                    shape = (name, len(rows), max(length, bucket(max(map(len, rows)))))
                    if shape not in warm:
                        runner.decode(rows)
                        warm.add(shape)
                    request = turn * len(prompts) + first
                    runs = [runner.decode(rows, request) for _ in range(protocol.repeats)]
                    tokens, accepts, _, after = runs[0]
                    runner.keep(after)  # only now: a repeat must not know the answer
                    seconds = tuple(run[2] / len(rows) for run in runs)
                    for p, row, new, lengths in zip(group, rows, tokens, accepts, strict=True):
                        text = target.tokenizer.decode(new)
                        answers[name, p.question_id].append(text)
                        asked[name].append(row)
                        records[name].append(
                            TurnRecord(
                                p.question_id,
                                p.category,
                                turn,
                                tuple(new),
                                text,
                                tuple(lengths),
                                seconds,
                            )  # fmt: skip
                        )
                    advance(len(group))
                groups.append(rows)
    reference = next(r.method.name for r in runners if r.method.drafter is None)
    sampled = [groups[i] for i in np.linspace(0, len(groups) - 1, min(3, len(groups))).astype(int)]
    sampled = [g for g in sampled if len(g) == len(groups[0])]
    return [
        _method_run(
            target, r, records[r.method.name], asked[r.method.name], records[reference],
            r.round_costs(sampled, timing_repeats), protocol,
        )
        for r in runners
    ]  # fmt: skip


def _method_run(target, runner, turns, asked, reference, costs, protocol) -> MethodRun:
    method, engine = runner.method, runner.engine
    definition = engine.drafter
    times, (draft_flops, verify_flops) = costs
    answers = [(a, t.tokens) for a, t in zip(asked, turns, strict=True)]
    if not engine.rule.exact:
        verdict = lossy_verdict(target, protocol.sampling, answers)
    elif protocol.sampling.greedy:
        pairs = [(a, v.tokens, t.tokens) for a, v, t in zip(asked, reference, turns, strict=True)]
        verdict = identical_verdict(target, pairs)
    else:
        verdict = distribution_verdict(target, protocol.sampling, answers)
    return MethodRun(
        method=method.name,
        task=protocol.task,
        temperature=protocol.sampling.temperature,
        seed=protocol.seed,
        batch=protocol.batch,
        rule=engine.rule.name,
        exact=engine.rule.exact,
        nodes=definition.nodes,
        depth=definition.depth,
        turns=turns,
        draft_ms=times.draft,
        verify_ms=times.verify,
        round_ms=times.round,
        drafter_parameters=0 if method.drafter is None else method.drafter.num_params,
        train_tokens=method.cost.tokens,
        train_seconds=method.cost.seconds,
        lossless=verdict,
        draft_flops=draft_flops,
        verify_flops=verify_flops,
    )


def shaded_pieces(target: Target, record: TurnRecord) -> list[tuple[str, int]]:
    """(text, depth) of each token: 0 is the target's own, i an accepted draft of depth i."""
    depths = []
    for emitted in record.accept_lengths:
        depths += [*range(1, emitted), 0]
    pieces, done = [], ""
    for i, depth in enumerate(depths):
        text = target.tokenizer.decode(list(record.tokens[: i + 1]))
        if not text.endswith("\ufffd"):  # an unfinished character belongs to the next token
            pieces.append((text[len(done) :], depth))
            done = text
    return pieces
