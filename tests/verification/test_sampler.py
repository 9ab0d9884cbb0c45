"""`verify` samples from `law`: chi-square over (stop node, extra token) on random drafts."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from samples import DEPTH, ROWS, RULES, VOCAB, some_drafts

from specjax.trees import DraftTree
from specjax.verification import law, make_noise, verify

NOISES = 6_000


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
    draft = jax.tree.map(lambda x: jnp.asarray(x[0]), drafts)

    @functools.partial(jax.jit, static_argnums=0)
    def run(shared, keys):
        def one(key):
            noise = make_noise(key, ROWS, DEPTH)
            if shared:
                noise = noise.replace(token_A=jnp.full(DEPTH + 1, noise.accept_T[1]))
            out = verify(noise, draft, jnp.asarray(targets[0]), rule)
            last = jnp.maximum(out.count - 2, 0)
            node = jnp.where(out.count > 1, out.path_D[last], 0)
            return node * VOCAB + out.tokens_A[out.count - 1]

        return jax.vmap(one)(keys)

    stop_T, next_TxV = law(draft, targets[0], rule)
    table = (stop_T[:, None] * next_TxV).ravel()
    expected = {c: float(p) for c, p in enumerate(table) if p > 0}

    def p_value(shared):
        cells = np.bincount(run(shared, jax.random.split(jax.random.key(0), 5 * NOISES)))
        return laws.chi_square({c: int(n) for c, n in enumerate(cells) if n}, expected)

    assert p_value(shared=False) > 1e-3 and p_value(shared=True) < 1e-9
