"""python -m benchmarks.decode: what each part of decoding takes, against what the machine allows.

Times plain decoding, verifying trees of several sizes, one draft and one whole round of FastEagle
and of EAGLE-3 (untrained: time does not depend on the weights), all in turns in one process, and
prints each beside its floor: the larger of (weights and cache read) / (measured bandwidth) and
(operations) / (measured matrix throughput).

    python -m benchmarks.decode --target=builtin
    python -m benchmarks.decode --target=random:768x2048x12x32000 --rows=1,8,16
    python -m benchmarks.decode --geometry=llama31_8b
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console

from benchmarks import timing
from benchmarks.targets import GEOMETRY_HELP, TARGET_HELP, geometry_target, get_target
from benchmarks.work import Work, draft_pass, target_pass, weight_bytes
from experiments import commands
from specjax import decoding
from specjax.console import make_console, print_rows
from specjax.drafters import Drafter, Vanilla
from specjax.generation import request_keys
from specjax.models.target import Target
from specjax.trained import init_drafter
from specjax.trees import Topology, chain
from specjax.verification import get_rule

_TARGET = flags.DEFINE_string("target", "builtin", TARGET_HELP)
_GEOMETRY = flags.DEFINE_string("geometry", None, f"in place of --target: {GEOMETRY_HELP}")
_LAYERS = flags.DEFINE_integer("layers", 0, "with --geometry: target layers, 0 = all of them")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16")
_CONTEXT = flags.DEFINE_integer("context", 256, "committed tokens before the first round")
_ROWS = flags.DEFINE_list("rows", ["1", "8", "16", "32", "64"], "rows per verification")
_DEPTH = flags.DEFINE_integer("depth", 5, "draft depth of both drafters")
_CANDIDATES = flags.DEFINE_integer("candidates", 3, "candidates a level in the tree drafts")
_REPEATS = flags.DEFINE_integer("repeats", 15, "samples of each call", lower_bound=1)
_IN_A_ROW = flags.DEFINE_integer("in_a_row", 8, "calls that make up one sample", lower_bound=1)
_PROFILE = flags.DEFINE_string("profile", None, "folder for a jax.profiler trace of all calls")
_JSON = flags.DEFINE_string("json", None, "file for the numbers")


@dataclasses.dataclass(frozen=True)
class Rows(Drafter):
    """Stands in for a drafter where only verifying a chain of `rows` rows is of interest."""

    name: ClassVar[str] = "rows"
    rows: int = 1

    @property
    def nodes(self) -> int:
        return self.rows

    @property
    def depth(self) -> int:
        return self.rows - 1

    @property
    def topology(self) -> Topology:
        return chain(self.rows - 1)

    def draft(self, params, target_params, state, context, key):
        tokens = jnp.broadcast_to(context.root_B()[:, None], (key.shape[0], self.rows))
        return self.topology.draft(tokens), state


# ---- the parts of a round as calls that can be repeated ------------------------------------------


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _draft_again(engine, params, state):
    """`decoding.draft`, its cache written in place but its length put back for the next call."""
    tree, drafter = decoding.draft(engine, params, state)
    if hasattr(drafter, "cache"):
        lengths = state.drafter.cache.lengths_B
        drafter = drafter.replace(cache=drafter.cache.replace(lengths_B=lengths))
    return state.replace(drafter=drafter), tree


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score_again(engine, params, cache, tree):
    """`decoding.score`: it leaves the cache's length where it was."""
    scored, cache = decoding.score(engine, params, cache, tree)
    return cache, scored


class Decoder:
    """One engine with its parameters and a state at the wished context."""

    def __init__(self, target: Target, drafter: Drafter, params, context: int, slots: int, rounds):
        self.engine = decoding.Engine(target.config, drafter, get_rule("greedy"))
        self.params = {"target": target.params, "drafter": params}
        tokens = np.random.default_rng(0).integers(0, target.config.vocab_size, (1, context))
        self.start = decoding.prefill(
            self.engine, self.params, jnp.asarray(tokens, jnp.int32), jnp.full(1, context),
            jnp.full(1, rounds + 1), request_keys(0, 1), slots, rounds,
        )  # fmt: skip
        self.reset()

    def reset(self) -> None:
        """Back to the state after prefill, in buffers that may be donated."""
        self.state = jax.tree.map(jnp.copy, self.start)
        self.done = jnp.all(self.state.done_B)

    def rounds(self, count: int):
        """Rounds as `decoding.run_host` drives them: `done` is read one round late."""
        for _ in range(count):
            self.state = decoding.jit_round(self.engine, self.params, self.state)
            np.asarray(self.done)
            self.done = jnp.all(self.state.done_B)
        return self.state.lengths_B

    def device_loop(self, count: int):
        """Rounds in one `while_loop` on the device (plain decoding: a round is a token)."""
        limits_B = jnp.full(1, count + 1)
        state = self.state.replace(limits_B=limits_B)
        self.state = decoding.run_device(self.engine, self.params, state)
        return self.state.lengths_B

    def drafting(self) -> Callable:
        """A call that drafts once."""
        state = jax.tree.map(jnp.copy, self.start)

        def call():
            nonlocal state
            state, tree = _draft_again(self.engine, self.params, state)
            return tree.tokens_T

        return call

    def scoring(self) -> Callable:
        """A call that runs the target over one drafted tree."""
        state, tree = _draft_again(self.engine, self.params, jax.tree.map(jnp.copy, self.start))
        cache = state.cache

        def call():
            nonlocal cache
            cache, scored = _score_again(self.engine, self.params, cache, tree)
            return scored

        return call


# ---- what is measured ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a call, the work it must do, what to do before a sample of it."""

    call: Callable
    work: Work
    before: Callable = lambda: None


def drafters(target: Target, depth: int, candidates: int) -> dict[str, tuple[Drafter, Any]]:
    """Untrained drafters of the same depth and node budget: a chain and a tree of each method."""
    settings = {
        "fasteagle chain": ("fasteagle", dict(num_layers=depth)),
        "fasteagle tree": ("fasteagle", dict(num_layers=depth, candidates=candidates)),
        "eagle3 chain": ("eagle3", dict(steps=depth)),
        "eagle3 tree": (
            "eagle3", dict(steps=depth, top_k=candidates, total_nodes=depth * candidates + 1),
        ),
    }  # fmt: skip
    made = {}
    for label, (name, config) in settings.items():
        trained = init_drafter(name, target, **config)
        dtype = target.params["embed"].dtype
        cast = lambda w: w.astype(dtype) if w.dtype == jnp.float32 else w  # noqa: B023,E731
        made[label] = trained.definition, jax.tree.map(cast, trained.params)
    return made


def make_rows(target: Target, context, rows, depth, candidates, count) -> dict[str, Row]:
    """All lines of the table for one target; every call does its work `count` times."""
    scratch = max(*rows, depth * candidates + 1, depth + 1 + (depth - 1) * candidates)
    slots = -(-(context + count * (depth + 1) + scratch + 1) // 64) * 64
    decoder = functools.partial(
        Decoder, target, context=context, slots=slots, rounds=(count + 1) * (depth + 1)
    )
    repeat = functools.partial(timing.in_a_row, count=count)
    vanilla, one = decoder(Vanilla(target.config), {}), target_pass(target, 1, context)
    loop = functools.partial(vanilla.device_loop, count)
    lines = {
        "vanilla round": Row(functools.partial(vanilla.rounds, count), one, vanilla.reset),
        "vanilla round, device loop": Row(loop, one, vanilla.reset),
    }
    for number in rows:
        scoring = decoder(Rows(target.config, number), {}).scoring()
        work = target_pass(target, number, context)
        lines[f"verify {number} row{'s' * (number > 1)}"] = Row(repeat(scoring), work)
    for label, (definition, params) in drafters(target, depth, candidates).items():
        made = decoder(definition, params)
        draft = draft_pass(definition, params, target, context)
        verify = target_pass(target, definition.nodes, context)
        whole = functools.partial(made.rounds, count)
        lines[f"{label}: draft"] = Row(repeat(made.drafting()), draft)
        lines[f"{label}: verify {definition.nodes}"] = Row(repeat(made.scoring()), verify)
        lines[f"{label}: round"] = Row(whole, draft + verify, made.reset)
    return lines


def splits(timings: dict[str, timing.Timing]) -> list[dict]:
    """What of each round lies outside the forwards, from samples of the same turn."""
    rows = [("vanilla", "vanilla round", None, "verify 1 row")]
    labels = [name.removesuffix(": round") for name in timings if name.endswith(": round")]
    for label in labels:
        verify = next(name for name in timings if name.startswith(f"{label}: verify"))
        rows.append((label, f"{label}: round", f"{label}: draft", verify))
    result = []
    for label, whole, draft, verify in rows:
        if verify not in timings:
            continue
        draft_ms = timings[draft].ms if draft else 0.0
        parts = np.array(timings[verify].seconds)
        if draft:
            parts = parts + np.array(timings[draft].seconds)
        outside = 1 - parts / np.array(timings[whole].seconds)
        low, share, high = np.percentile(outside, (25, 50, 75))
        result.append(
            {
                "method": label, "round_ms": timings[whole].ms, "draft_ms": draft_ms,
                "verify_ms": timings[verify].ms, "outside_share": float(share),
                "outside_quartiles": [float(low), float(high)],
            }
        )  # fmt: skip
    return result


def comparisons(timings: dict[str, timing.Timing]) -> list[dict]:
    """Draft time of FastEagle over EAGLE-3's, chain by chain and tree by tree."""
    result = []
    for shape in ("chain", "tree"):
        pair = timings[f"fasteagle {shape}: draft"], timings[f"eagle3 {shape}: draft"]
        median, quartiles = timing.ratio(*pair)
        result.append({"shape": shape, "fasteagle_over_eagle3": median, "quartiles": quartiles})
    return result


def measure(target: Target, context, rows, depth, candidates, repeats, count, profile=None):
    """Runs everything; returns what the tables show, for machines."""
    machine = timing.measure_machine(weight_bytes(target.params))
    lines = make_rows(target, context, rows, depth, candidates, count)
    calls = {name: line.call for name, line in lines.items()}
    before = lambda name: lines[name].before()  # noqa: E731
    timings = timing.interleaved(calls, repeats, count, before=before)
    if profile:
        with jax.profiler.trace(profile):
            timing.interleaved(calls, 1, warmup=0, before=before)
    table = []
    for name, line in lines.items():
        floor = machine.floor_ms(line.work.bytes, line.work.flops)
        table.append(
            {
                "what": name, "ms": timings[name].ms, "quartiles_ms": timings[name].quartiles_ms,
                "bytes": line.work.bytes, "flops": line.work.flops, "floor_ms": floor,
                "times_floor": timings[name].ms / floor,
            }
        )  # fmt: skip
    return {
        "target": target.name, "parameters": target.num_params,
        "dtype": str(target.params["embed"].dtype), "context": context, "depth": depth,
        "candidates": candidates, "device": jax.devices()[0].device_kind,
        "cores": timing.cores(), "machine": dataclasses.asdict(machine), "rows": table,
        "splits": splits(timings), "drafts": comparisons(timings),
    }  # fmt: skip


# ---- printing ------------------------------------------------------------------------------------


def print_report(report: dict, console: Console) -> None:
    """The machine's limits, one line per call, the split of each round."""
    limits, giga = report["machine"], 1e-9
    console.print(
        f"{report['target']}: {report['parameters'] / 1e6:.1f}M parameters, {report['dtype']}, "
        f"context {report['context']}, depth {report['depth']}, {report['candidates']} candidates; "
        f"{report['device']}, {report['cores']} cores"
    )
    for name, text in (
        ("large", f"GB/s reading {timing.LARGE_BYTES >> 20} MiB"),
        ("weights", "GB/s reading an array of the weights' size (floors below)"),
        ("matmul", f"GFLOP/s float32, square {timing.MATMUL_SIZE}"),
    ):
        limit = limits[name]
        console.print(f"  {giga * limit['per_second']:7.1f} {text} ({limit['method']})")
    rows = [
        (
            r["what"], f"{r['ms']:.3f}", f"{r['quartiles_ms'][0]:.3f}-{r['quartiles_ms'][1]:.3f}",
            f"{r['bytes'] / 1e6:.1f}", f"{r['flops'] / 1e6:.1f}", f"{r['floor_ms']:.3f}",
            f"{r['times_floor']:.1f}x",
        )
        for r in report["rows"]
    ]  # fmt: skip
    headings = "what | ms | quartiles | MB read | MFLOP | floor ms | times floor"
    print_rows(console, headings, rows, "Median time against the floor")
    rows = [
        (
            s["method"], f"{s['round_ms']:.3f}", f"{s['draft_ms']:.3f}", f"{s['verify_ms']:.3f}",
            f"{100 * s['outside_share']:.0f}%",
            "{:.0f}%..{:.0f}%".format(*(100 * q for q in s["outside_quartiles"])),
        )
        for s in report["splits"]
    ]  # fmt: skip
    headings = "round of | round ms | draft ms | verify ms | outside forwards | quartiles"
    print_rows(console, headings, rows, "Where a round's time goes")
    for row in report["drafts"]:
        console.print(
            f"one FastEagle draft / one EAGLE-3 draft, {row['shape']}: "
            "{:.2f} (quartiles {:.2f}-{:.2f})".format(
                row["fasteagle_over_eagle3"], *row["quartiles"]
            )
        )


def main():
    rows = commands.tried("rows", lambda: sorted({int(r) for r in _ROWS.value}))
    if rows[0] < 1 or _DEPTH.value < 1 or _CANDIDATES.value < 2 or _CONTEXT.value < 1:
        raise app.UsageError("rows, depth and context: at least 1; candidates: at least 2")
    if _GEOMETRY.value:
        target = commands.tried("geometry", geometry_target, _GEOMETRY.value, _LAYERS.value)
    else:
        target = commands.tried("target", get_target, _TARGET.value, _DTYPE.value)
    report = measure(
        target, _CONTEXT.value, rows, _DEPTH.value, _CANDIDATES.value, _REPEATS.value,
        _IN_A_ROW.value, _PROFILE.value,
    )  # fmt: skip
    print_report(report, make_console())
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    commands.run(main)
