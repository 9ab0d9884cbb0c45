"""Decodes the same prompts with every method in one process, interleaved, and times them."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from specjax import decoding
from specjax.data.prompt_files import Prompt
from specjax.data.templates import encode_chat, encode_prompt, turn_messages
from specjax.evaluation.exactness import rounding_tie
from specjax.evaluation.lossless import distribution_verdict, identical_verdict, lossy_verdict
from specjax.evaluation.records import MethodRun, TurnRecord
from specjax.evaluation.timing import RoundTimes, count_flops, time_rounds
from specjax.generation import bucket, cache_slots, collect, make_engine, start
from specjax.models.target import Target
from specjax.profiling import traced
from specjax.progress import progress
from specjax.sampling import Sampling
from specjax.streaming import Detokenizer
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
    return cut_left(ids, protocol.max_prompt_tokens, target.config.bos_token_id)


def cut_left(ids: list[int], most: int, bos: int | None) -> list[int]:
    """The last `most` tokens (0: all), of which the first is `bos` where it was before."""
    if not most or len(ids) <= most:
        return ids
    head = ids[:1] if ids[0] == bos else []
    return head + ids[len(ids) - most + len(head) :]


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

    def under_way(self, rows: list[list[int]], rounds: int = 3):
        """The state some rounds into a batch."""
        return self.rounds(self._start(rows), rounds)

    def rounds(self, state, count: int):
        """The state `count` rounds later."""
        for _ in range(count):
            state = decoding.jit_round(self.engine, self.params, state)
        return state


def round_costs(runners: Sequence[Runner], batches: list[list[list[int]]], repeats: int):
    """[(median times over states a few rounds into each batch, flops of the draft and verify)].

    Methods take turns here too: their break-even tau is a ratio of two of these times.
    """
    times = []
    for rows in batches:
        states = [r.under_way(rows) for r in runners]
        timed = [(r.engine, r.params, s) for r, s in zip(runners, states, strict=True)]
        times.append([dataclasses.astuple(t) for t in time_rounds(timed, repeats)])
    costs = []
    for runner, state, three in zip(runners, states, np.median(times, axis=0), strict=True):
        flops = count_flops(runner.engine, runner.params, state)
        with traced(f"decode/{runner.method.name}") as rounds:  # after all that is timed
            jax.block_until_ready(runner.rounds(state, rounds).lengths_B)
        draft, verify, whole = three.tolist()
        draft = 0.0 if runner.method.drafter is None else draft
        costs.append((RoundTimes(draft, verify, whole), flops))
    return costs


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
    plain = next(r.method.name for r in runners if r.method.drafter is None)
    reference = [
        (prompt, turn.tokens) for prompt, turn in zip(asked[plain], records[plain], strict=True)
    ]
    sampled = [groups[i] for i in np.linspace(0, len(groups) - 1, min(3, len(groups))).astype(int)]
    sampled = [g for g in sampled if len(g) == len(groups[0])]
    costs = round_costs(runners, sampled, timing_repeats)
    return [
        _method_run(
            target, r, records[r.method.name], asked[r.method.name], reference, cost, protocol
        )
        for r, cost in zip(runners, costs, strict=True)
    ]


def losslessness(
    target: Target, drafter: TrainedDrafter | None, rule, sampling: Sampling, answers, reference
) -> dict:
    """The verdict on a method's answers, and under "tie" the logit gap that it leaves to rounding.

    Args:
      answers: (prompt ids, new tokens) of every turn.
      reference: the same of plain decoding. At temperature 0 turns are compared whose prompts are
        equal: a conversation that has parted asks its later turns after another text.
    """
    tie, _ = rounding_tie(target, drafter, [prompt for prompt, _ in reference])
    if not rule.exact:
        verdict = lossy_verdict(target, sampling, answers, tie)
    elif sampling.greedy:
        pairs = [
            (prompt, plain, new)
            for (prompt, new), (asked, plain) in zip(answers, reference, strict=True)
            if prompt == asked
        ]
        verdict = identical_verdict(target, pairs, tie)
    else:
        verdict = distribution_verdict(target, sampling, answers, tie)
    return verdict | {"tie": tie}


def _method_run(target, runner, turns, asked, reference, costs, protocol) -> MethodRun:
    method, engine = runner.method, runner.engine
    definition = engine.drafter
    times, (draft_flops, verify_flops) = costs
    answers = [(a, t.tokens) for a, t in zip(asked, turns, strict=True)]
    verdict = losslessness(
        target, method.drafter, engine.rule, protocol.sampling, answers, reference
    )
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
    """(text, depth) of each token: 0 is the target's own, i an accepted draft of depth i.

    Tokens without text of their own, special ones among them, are left out.
    """
    words = Detokenizer(target.tokenizer)
    texts = [words.feed(token) for token in record.tokens]
    texts[-1] += words.flush()
    depths = [d for emitted in record.accept_lengths for d in (*range(1, emitted), 0)]
    return [piece for piece in zip(texts, depths, strict=True) if piece[0]]
