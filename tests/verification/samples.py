"""Every rule with trees it covers, as padded batches of random drafts for the fast paths."""

import functools

import jax
import numpy as np
import proofs

from specjax.trees import backbone, chain, chains, paths
from specjax.verification import Noise, get_rule, verify

ROWS, WIDTH, DEPTH, VOCAB = 9, 3, 2, 5
KEYS = 64  # noises a draft, where results are looked at one by one
CHAINS = (chain(2), chain(1), chain(2))
TREES = (backbone(2, 2), backbone(2, 3), paths([(0,), (1,), (0, 0), (0, 1), (1, 0)]))
BUNCHES = (chains(2, 2), chains(3, 2), chains(3, 1))
RULES = {
    "greedy": (get_rule("greedy"), TREES, "top"),
    "match": (get_rule("match"), TREES, "without_replacement"),
    "token": (get_rule("token"), CHAINS, "chains"),
    "block": (get_rule("block"), CHAINS, "chains"),
    "rrs": (get_rule("recursive_rejection"), TREES, "without_replacement"),
    "rrs, replaced": (
        get_rule("recursive_rejection", replacement=True), TREES, "with_replacement",
    ),
    "rrs, top": (get_rule("recursive_rejection"), TREES, "top"),
    "k_seq": (get_rule("k_seq"), BUNCHES, "chains"),
    "traversal": (get_rule("traversal"), TREES, "without_replacement"),
    "traversal, replaced": (get_rule("traversal", replacement=True), TREES, "with_replacement"),
    "traversal, top": (get_rule("traversal"), TREES, "top"),
    "typical": (get_rule("typical"), TREES, "top"),
    "lenient": (get_rule("lenient"), CHAINS, "chains"),
    "judge": (get_rule("judge"), TREES, "top"),
    "unverified": (get_rule("unverified"), CHAINS + TREES, "top"),
    "judge, token": (get_rule("judge", base="token"), CHAINS, "chains"),
}  # fmt: skip


def some_drafts(seed, shapes, kind):
    """Drafts of all shapes at one padded size: zeros in p and q, the last row off in some."""
    rng, trees, targets = np.random.default_rng(seed), [], []
    for i, shape in enumerate(shapes * 2):
        valid = np.arange(shape.nodes) < shape.nodes - (i >= len(shapes))
        case = proofs.random_case(rng, shape, VOCAB, kind, 0.3 * (i % 2), valid)
        tree, logp_TxV = proofs.padded(rng, *proofs.random_draft(rng, case), ROWS, WIDTH)
        trees.append(tree)
        targets.append(logp_TxV.astype(np.float32))
    stacked = jax.tree.map(lambda *x: np.stack(x), *trees)
    as_device = lambda x: x.astype({"f": np.float32, "i": np.int32, "b": bool}[x.dtype.kind])  # noqa: E731
    force_BxT = rng.random((len(trees), ROWS)) < 0.3
    return jax.tree.map(as_device, stacked), np.stack(targets), force_BxT


def noises(seed, batch, rows=ROWS):
    rng = np.random.default_rng(seed)
    uniform = lambda *shape: rng.random(shape, np.float32)  # noqa: E731
    return Noise(uniform(batch, rows), uniform(batch, DEPTH + 1))


@functools.partial(jax.jit, static_argnums=0)
def batched(rule, noise, drafts, targets, force):
    return verify(noise, drafts, targets, rule, force)


def repeated(name, seed):
    """(rule, drafts, targets, force) with every draft KEYS times."""
    rule, shapes, kind = RULES[name]
    parts = some_drafts(seed, shapes, kind)
    again = lambda x: np.repeat(x, KEYS, axis=0)  # noqa: E731
    drafts, targets, force = jax.tree.map(again, parts)
    return rule, drafts, targets, force if name.startswith("judge") else None
