"""python -m benchmarks.lookup: what looking up costs in a round.

For each drafter that only looks things up, in turns: whole rounds, the drafter's part of them alone
(draft and absorb, on a round's own logits), and steps of plain decoding. A sample runs many of each
in one program on the device, so that no dispatch is timed.

    python -m benchmarks.lookup --target=builtin --context=512
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import timing
from benchmarks.targets import TARGET_HELP, get_target
from experiments import commands
from specjax import decoding, init_drafter
from specjax.console import make_console, print_rows
from specjax.drafters import Committed
from specjax.drafters.rasd import fused
from specjax.generation import make_engine, start

_TARGET = flags.DEFINE_string("target", "builtin", TARGET_HELP)
_CONTEXT = flags.DEFINE_integer("context", 512, "committed tokens, prompt included", lower_bound=8)
_REPEATS = flags.DEFINE_integer("repeats", 20, "samples of each", lower_bound=1)

ROUNDS = 16  # in one sample
# The trees of configs/compare.py and the published ones.
TREES = (
    ("prompt_lookup", {"draft_depth": 6}),
    ("prompt_lookup", {"draft_depth": 10}),
    ("token_recycling", {"tree_nodes": 6}),
    ("token_recycling", {"tree_nodes": 80}),
    ("rasd", {"retrieved_nodes": 6}),  # retrieval alone, from the text so far and a corpus
    ("rasd", {"retrieved_nodes": 64}),
)
DOCUMENTS = 320  # of the corpus, 18 phrases each: as many tokens as configs/compare.py trains on


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _rounds(engine, params, state):
    return jax.lax.fori_loop(0, ROUNDS, lambda _, s: decoding.round(engine, params, s), state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _lookups(engine, params, state):
    """Drafts and absorbs a whole accepted path, each time on other tokens and other logits."""
    drafter, B, scored = engine.drafter, state.lengths_B.shape[0], params["scored"]
    whole = jnp.full(B, drafter.depth + 1, jnp.int32)

    def one(i, state):
        tree, own = decoding.draft(engine, params, state)
        logits_BxTxV = jnp.roll(scored.logits_BxTxV, i, axis=1)
        newest_BxA = jax.lax.dynamic_slice_in_dim(state.tokens_BxS, i, drafter.depth + 1, axis=1)
        own = drafter.absorb(
            params["drafter"], own, Committed(newest_BxA, None, whole), tree,
            scored.replace(logits_BxTxV=logits_BxTxV),
        )  # fmt: skip
        drafted = jnp.max(tree.tokens_T, axis=1) * jnp.any(tree.valid_T, axis=1)
        tokens_BxS = state.tokens_BxS.at[jnp.arange(B), state.lengths_B - 1].set(drafted)
        return state.replace(tokens_BxS=tokens_BxS, drafter=own)

    return jax.lax.fori_loop(0, ROUNDS, one, state)


@functools.partial(jax.jit, static_argnums=0)
def _scored(engine, params, state):
    tree, _ = decoding.draft(engine, params, state)
    return decoding.score(engine, params, state.cache, tree)[0]


def timed(calls) -> dict[str, timing.Timing]:
    """Each (program, engine, params, state) in turns; a sample consumes a copy of the state."""
    copies = {}

    def copy(label):
        copies[label] = jax.block_until_ready(jax.tree.map(jnp.copy, calls[label][3]))

    def call(label):
        program, engine, params, _ = calls[label]
        return lambda: program(engine, params, copies.pop(label))

    calls_of = {label: call(label) for label in calls}
    return timing.interleaved(calls_of, _REPEATS.value, ROUNDS, before=copy)


def main():
    target = commands.tried("target", get_target, _TARGET.value)
    console = make_console()
    # Text that repeats itself now and then, as text does.
    rng = np.random.default_rng(0)
    phrases = rng.integers(1, target.config.vocab_size, (16, 12))
    prompt = phrases[rng.integers(0, 16, _CONTEXT.value)].reshape(-1)[: _CONTEXT.value].tolist()
    rows = []
    for name, tree in TREES:
        drafter = init_drafter(name, target, **tree)
        if name == "rasd":
            corpus = phrases[rng.integers(0, 16, (DOCUMENTS, 18))].reshape(DOCUMENTS, -1)
            drafter = fused(drafter, corpus)
        states = []
        for contender in (drafter, None):
            engine, params = make_engine(target, contender, stop_tokens=())
            room = ROUNDS * drafter.definition.nodes + 16
            states.append((engine, params, start(engine, params, [prompt], room)))
        engine, params, state = states[0]
        clocks = timed(
            {
                "round": (_rounds, *states[0]),
                "lookup": (_lookups, engine, params | {"scored": _scored(*states[0])}, state),
                "plain": (_rounds, *states[1]),
            }
        )
        share, quartiles = timing.ratio(clocks["lookup"], clocks["round"])
        rows.append(
            (name, str(drafter.definition.nodes), f"{clocks['plain'].ms:.2f}",
             f"{clocks['round'].ms:.2f}", f"{clocks['lookup'].ms:.4f}",
             "{:.2f}% [{:.2f}, {:.2f}]".format(100 * share, *(100 * q for q in quartiles)))
        )  # fmt: skip
    console.print(
        f"{target.name}: {target.num_params / 1e6:.1f}M parameters, {_CONTEXT.value} tokens of "
        f"context; ms, medians of {_REPEATS.value} samples; {timing.cores()} cores"
    )
    headings = "drafter | rows | plain step | round | looking up | of the round [quartiles]"
    print_rows(console, headings, rows, "Looking up, beside the round it is part of")


if __name__ == "__main__":
    commands.run(main)
