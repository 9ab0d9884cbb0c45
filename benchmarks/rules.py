"""python -m benchmarks.rules: what verifying costs beside the target's forward over the same rows.

Every rule on one static tree of 64 nodes at temperature 0 and above, with and without top-p, in
turns with the target's forward over those rows, each as its share of that forward.

    python -m benchmarks.rules --target=random:768x2048x12x32000 --batch=8
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import timing
from benchmarks.targets import TARGET_HELP, get_target
from experiments import commands
from specjax.cache import empty_cache, tree_cache_mask
from specjax.console import make_console, print_rows
from specjax.drafters.proposals import log_law
from specjax.models.transformer import forward, logits_of
from specjax.sampling import Sampling
from specjax.trees import Topology, backbone, chain, chains
from specjax.verification import get_rule, make_noise, rule_names
from specjax.verification.base import LogitRows

_TARGET = flags.DEFINE_string("target", "random:768x2048x12x32000", TARGET_HELP)
_BATCH = flags.DEFINE_integer("batch", 8, "sequences", lower_bound=1)
_DEPTH = flags.DEFINE_integer("depth", 9, "tree depth", lower_bound=1)
_CANDIDATES = flags.DEFINE_integer("candidates", 7, "candidates a level", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 128, "committed tokens", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "samples of each call", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "file for the numbers")

SAMPLINGS = {
    "T=0": Sampling(0.0),
    "T=1": Sampling(1.0),
    "T=1 top-p 0.9": Sampling(1.0, 0, 0.9),
}


def topology_of(rule, depth: int, candidates: int) -> Topology:
    """The tree of depth * candidates + 1 rows that a rule is timed on; chains have their own."""
    if rule.chain_only:
        return chain(depth * candidates)
    return chains(candidates, depth) if rule.draws == "chains" else backbone(depth, candidates)


def target_forward(target, batch: int, rows: int, context: int):
    """A call of the target over `rows` rows of each sequence, head included."""
    topology = backbone(1, rows - 1) if rows > 1 else Topology((-1,))
    slots = -(-(context + rows) // 64) * 64
    cache = empty_cache(target.config, batch, slots)
    cache = cache.replace(lengths_B=jnp.full(batch, context, jnp.int32))
    tokens_BxT = jnp.ones((batch, rows), jnp.int32)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(params, cache, tokens_BxT):
        positions = cache.lengths_B[:, None] + jnp.asarray(topology.depth_T)
        mask = tree_cache_mask(cache.lengths_B, topology.visible_TxT, slots)
        out = forward(params, target.config, tokens_BxT, positions, mask, cache)
        return logits_of(params, out.hidden_BxTxD), out.cache

    state = [cache]

    def call():
        logits_BxTxV, state[0] = run(target.params, state[0], tokens_BxT)
        return logits_BxTxV

    return call


def rule_call(rule, sampling: Sampling, logits_BxTxV, depth: int, candidates: int):
    """A call of `rule` on a drawn tree whose laws are near the target's."""
    B, T, V = logits_BxTxV.shape
    topology = topology_of(rule, depth, candidates)
    rng = np.random.default_rng(0)
    tokens_BxT = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    law_BxTxV = None
    if rule.draws != "top":
        law_BxTxV = jax.jit(lambda x: log_law(0.8 * x, sampling))(logits_BxTxV)
    tree = topology.draft(tokens_BxT, law_BxTxV)

    @jax.jit
    def run(keys_B, tree, logits_BxTxV):
        def one(key, tree, logits_TxV):
            noise = make_noise(key, T, topology.max_depth)
            return rule.verify(noise, tree, LogitRows(logits_TxV, sampling))

        return jax.vmap(one)(keys_B, tree, logits_BxTxV)

    keys_B = jax.random.split(jax.random.key(0), B)
    return lambda: run(keys_B, tree, logits_BxTxV)


def main():
    target = commands.tried("target", get_target, _TARGET.value)
    depth, candidates, batch = _DEPTH.value, _CANDIDATES.value, _BATCH.value
    rows = depth * candidates + 1
    forward_call = target_forward(target, batch, rows, _CONTEXT.value)
    logits_BxTxV = jnp.copy(forward_call())
    calls = {"target forward": forward_call}
    for name in rule_names():
        rule = get_rule(name)
        for label, sampling in SAMPLINGS.items():
            if (name == "greedy") != sampling.greedy:
                continue  # at temperature 0 every exact rule is the greedy one
            calls[f"{name}, {label}"] = rule_call(rule, sampling, logits_BxTxV, depth, candidates)
    timings = timing.interleaved(calls, _REPEATS.value, warmup=1)
    base = timings["target forward"]
    table = []
    for name, clock in timings.items():
        share, quartiles = timing.ratio(clock, base)
        table.append({"call": name, "ms": clock.ms, "share": share, "quartiles": quartiles})
    console = make_console()
    console.print(
        f"{target.name}: {target.num_params / 1e6:.1f}M parameters, float32, batch {batch}, "
        f"{rows} rows, vocabulary {target.config.vocab_size}; {timing.cores()} cores"
    )
    cells = [
        (r["call"], f"{r['ms']:.2f}", f"{100 * r['share']:.1f}%",
         "{:.1f}-{:.1f}%".format(*(100 * q for q in r["quartiles"])))
        for r in table
    ]  # fmt: skip
    print_rows(
        console, "call | ms | share | quartiles", cells, "Verifying beside the forward it verifies"
    )
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps({"rows": table}, indent=2) + "\n")


if __name__ == "__main__":
    commands.run(main)
