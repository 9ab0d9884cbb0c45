"""`verify` samples from `law`: chi-square over (stop node, extra token) on random drafts."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import proofs
import pytest

from specjax.trees import DraftTree, backbone, chain, chains, paths
from specjax.verification import get_rule, law, make_noise, verify

ROWS, WIDTH, DEPTH, VOCAB, NOISES = 9, 3, 2, 5, 6_000
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
    "judge": (get_rule("judge"), TREES, "top"),
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


@functools.partial(jax.jit, static_argnums=0)
def sample(rule, keys, drafts: DraftTree, targets, force):
    """Every draft under every key's noise: (stop node, extra token)."""

    def one(key, draft, logp_TxV, force_T):
        out = verify(make_noise(key, ROWS, DEPTH), draft, logp_TxV, rule, force_T)
        last = jnp.maximum(out.count - 2, 0)
        return jnp.where(out.count > 1, out.path_D[last], 0), out.tokens_A[out.count - 1]

    over_noise = jax.vmap(one, (0, None, None, None))
    return jax.vmap(over_noise, (None, 0, 0, 0))(keys, drafts, targets, force)


@pytest.mark.parametrize("name", RULES)
def test_verify_samples_from_the_law(name):
    rule, shapes, kind = RULES[name]
    compiled = sample._cache_size()
    for seed in (1, 2):  # the second batch compiles nothing
        drafts, targets, force = some_drafts(seed, shapes, kind)
        force = force if name.startswith("judge") else None
        keys = jax.random.split(jax.random.key(2 * list(RULES).index(name) + seed), NOISES)
        nodes, tokens = jax.device_get(sample(rule, keys, drafts, targets, force))
        for i in range(len(targets)):
            tree = jax.tree.map(lambda x, i=i: x[i], drafts)
            forced = None if force is None else force[i]
            stop_T, next_TxV = law(tree, targets[i], rule, forced)
            cells = np.argwhere(stop_T[:, None] * next_TxV > 0).tolist()
            expected = {(v, t): float(stop_T[v] * next_TxV[v, t]) for v, t in cells}
            pairs = nodes[i] * VOCAB + tokens[i]
            found = [
                (*divmod(int(c), VOCAB), int(n)) for c, n in enumerate(np.bincount(pairs)) if n
            ]
            observed = {(v, t): n for v, t, n in found}
            if len(expected) == 1:
                assert set(observed) == set(expected)
            else:
                bonferroni = 2 * len(RULES) * len(targets)
                assert laws.chi_square(observed, expected) > 1e-2 / bonferroni
    assert sample._cache_size() == compiled + 1


def test_a_planted_sampler_bug_is_caught():
    """The noise that accepts also draws the extra token."""
    rule, shapes, kind = RULES["token"]
    drafts, targets, _ = some_drafts(1, shapes, kind)
    draft = jax.tree.map(lambda x: x[0], drafts)

    @functools.partial(jax.jit, static_argnums=0)
    def run(shared, keys):
        def one(key):
            noise = make_noise(key, ROWS, DEPTH)
            if shared:
                noise = noise.replace(token_A=jnp.full(DEPTH + 1, noise.accept_T[1]))
            out = verify(noise, draft, targets[0], rule)
            last = jnp.maximum(out.count - 2, 0)
            node = jnp.where(out.count > 1, out.path_D[last], 0)
            return node * VOCAB + out.tokens_A[out.count - 1]

        return jax.vmap(one)(keys)

    stop_T, next_TxV = law(draft, targets[0], rule)
    table = (stop_T[:, None] * next_TxV).ravel()
    expected = {c: float(p) for c, p in enumerate(table) if p > 0}

    def p_value(shared):
        cells = np.bincount(run(shared, jax.random.split(jax.random.key(0), NOISES)))
        return laws.chi_square({c: int(n) for c, n in enumerate(cells) if n}, expected)

    assert p_value(shared=False) > 1e-3 and p_value(shared=True) < 1e-9
