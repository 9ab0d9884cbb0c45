"""Lossy rules: thresholds by hand, limits where they become exact, monotone acceptance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import RULES, batched, noises, repeated
from toys import PROMPTS, prefilled, toy_target

import specjax
from specjax import decoding, generation
from specjax.models.transformer import forward
from specjax.sampling import Sampling
from specjax.trees import backbone, chains
from specjax.verification import JudgeHead, get_rule, law, make_noise, verify

NEVER, ALWAYS = JudgeHead(np.zeros(16), -50.0), JudgeHead(np.zeros(16), 50.0)


# ---- typical acceptance --------------------------------------------------------------------------


def one_step(p_V, token, **parameters):
    """Whether a single drafted token is accepted: the law, then the fast rule."""
    tree = jax.tree.map(lambda x: x[0], backbone(1, 1).draft(jnp.array([[0, token]])))
    rule, logp_TxV = get_rule("typical", **parameters), np.log(np.stack([p_V, p_V]) + 1e-30)
    stop_T, _ = law(tree, logp_TxV, rule)
    fast = verify(make_noise(jax.random.key(0), 2, 1), tree, jnp.float32(logp_TxV), rule)
    assert int(fast.count) - 1 == stop_T[1] and stop_T.sum() == 1
    return bool(stop_T[1])


def test_typical_on_peaked_laws_compares_with_epsilon():
    for p, accepted in ((0.095, True), (0.085, False)):
        assert one_step(np.array([1 - p, p, 0.0, 0.0]), 1) == accepted
        assert one_step(np.array([1 - p, p, 0.0, 0.0]), 1, epsilon=0.08)
    assert one_step(np.array([0.999, 0.001, 0.0, 0.0]), 0)
    assert not one_step(np.array([0.999, 0.001, 0.0, 0.0]), 1)


@pytest.mark.parametrize("V", [4, 40])
def test_typical_on_uniform_laws_compares_with_delta_over_v(V):
    p_V = np.full(V, 1 / V)  # p = 1/V > delta/V exactly if delta < 1
    assert one_step(p_V, 2, epsilon=1.0, delta=0.99)
    assert not one_step(p_V, 2, epsilon=1.0, delta=1.01)


def test_looser_typical_never_accepts_less():
    _, drafts, targets, _ = repeated("typical", 1)
    noise = noises(1, len(targets))
    counts = [
        jax.device_get(batched(get_rule("typical", **p), noise, drafts, targets, None)).count
        for p in ({"epsilon": 0.5, "delta": 0.9}, {}, {"epsilon": 0.01, "delta": 0.05})
    ]
    assert (np.diff(counts, axis=0) >= 0).all() and counts[-1].sum() > counts[0].sum()


# ---- lenience ------------------------------------------------------------------------------------


def first_token(p_V, q_V, rule):
    """The law of the first token emitted when one child is drawn from q and the rule judges it."""
    emitted_V, V = np.zeros(len(p_V)), len(p_V)
    tree = jax.tree.map(lambda x: x[0], chains(1, 1).draft(jnp.zeros((1, 2), jnp.int32)))
    logs = [np.log(np.stack([x, x]) + 1e-300) for x in (p_V, q_V)]
    for token in range(V):
        drawn = tree.replace(tokens_T=np.array([0, token]), law_TxV=logs[1])
        stop_T, next_TxV = law(drawn, logs[0], rule)
        emitted_V += q_V[token] * (stop_T[0] * next_TxV[0] + stop_T[1] * np.eye(V)[token])
    return emitted_V


@pytest.mark.parametrize("lenience", [0.9, 0.5, 0.1, 0.01])
def test_lenience_bounds_every_probability(lenience):
    rng, rule, moved = np.random.default_rng(0), get_rule("lenient", lenience=lenience), 0.0
    for _ in range(20):
        p_V, q_V = rng.dirichlet(np.full(5, 0.5), 2)
        emitted_V = first_token(p_V, q_V, rule)
        # Accepted outright up to p/l; what is left of the mass goes where p exceeds l q.
        kept_V = np.minimum(q_V, p_V / lenience)
        left_V = np.maximum(p_V - lenience * q_V, 0)
        expected_V = kept_V + (1 - kept_V.sum()) * left_V / left_V.sum()
        np.testing.assert_allclose(emitted_V, expected_V, atol=1e-12)
        assert (emitted_V <= p_V / lenience + 1e-12).all()
        moved = max(moved, 0.5 * np.abs(emitted_V - p_V).sum())
    assert moved > 0.02, "a lossy rule that loses nothing tests nothing"


def test_lenience_one_is_token():
    _, drafts, targets, _ = repeated("token", 5)
    noise = noises(5, len(targets))
    token, one, half = (
        jax.device_get(batched(rule, noise, drafts, targets, None))
        for rule in (get_rule("token"), get_rule("lenient", lenience=1.0), get_rule("lenient"))
    )
    jax.tree.map(np.testing.assert_array_equal, one, token)
    assert (half.count >= token.count).all() and half.count.sum() > token.count.sum()


# ---- judge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, base", [("judge", "match"), ("judge, token", "token")])
def test_judge_between_never_and_always(name, base):
    judge, drafts, targets, force = repeated(name, 2)
    noise = noises(2, len(targets))
    run = lambda rule, force: jax.device_get(batched(rule, noise, drafts, targets, force))  # noqa: E731
    plain = run(get_rule(base), None)
    for a in (run(judge, None), run(judge, np.zeros_like(force))):
        jax.tree.map(np.testing.assert_array_equal, a, plain)
    some, every = run(judge, force), run(judge, np.ones_like(force))
    assert (some.count >= plain.count).all() and some.count.sum() > plain.count.sum()
    ends = np.where(every.count > 1, np.take_along_axis(
        every.path_D, np.maximum(every.count - 2, 0)[:, None], 1)[:, 0], 0)  # fmt: skip
    for i, end in enumerate(ends):  # a leaf of what is valid
        assert not ((drafts.parent_T[i] == end) & drafts.valid_T[i]).any()


def test_a_larger_force_mask_never_accepts_less_of_a_chain():
    judge, drafts, targets, force = repeated("judge, token", 4)
    noise, rng = noises(4, len(targets)), np.random.default_rng(0)
    more = force | (rng.random(force.shape) < 0.4)
    for base in ("token", "match"):
        rule = get_rule("judge", base=base)
        few = jax.device_get(batched(rule, noise, drafts, targets, force)).count
        many = jax.device_get(batched(rule, noise, drafts, targets, more)).count
        assert (many >= few).all() and many.sum() > few.sum()


def test_heads_and_thresholds_at_the_ends():
    hidden = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)
    for options, forced in (
        ({"head": NEVER}, 0), ({"head": ALWAYS}, 7),
        ({"head": ALWAYS, "threshold": 1.0}, 0), ({"head": NEVER, "threshold": 0.0}, 7),
    ):  # fmt: skip
        assert int(get_rule("judge", **options).force(hidden).sum()) == forced
    head = JudgeHead(np.eye(16)[3], 0.2)
    want = 1 / (1 + np.exp(-(hidden[:, 3] + 0.2))) > 0.7
    np.testing.assert_array_equal(get_rule("judge", head=head, threshold=0.7).force(hidden), want)


def test_the_judge_reads_the_hidden_state_at_the_drafted_token():
    target = toy_target(num_layers=2)
    drafter = specjax.init_drafter("fasteagle", target, num_layers=2)
    sampling = Sampling(1.0)

    rule = get_rule("judge", head=NEVER)
    engine, params = generation.make_engine(target, drafter, sampling, (), rule)

    @jax.jit
    def drafted(state):
        tree, _ = decoding.draft(engine, params, state)
        return tree, decoding.score(engine, params, state.cache, tree)[0].hidden_BxTxD

    @jax.jit
    def read(tokens_BxT):  # the plain way: one causal forward
        T = tokens_BxT.shape[1]
        places = jnp.broadcast_to(jnp.arange(T), tokens_BxT.shape)
        return forward(
            target.params, target.config, tokens_BxT, places, jnp.tril(jnp.ones((1, T, T), bool))
        ).hidden_BxTxD

    tree, hidden_BxTxD = jax.device_get(drafted(prefilled(engine, params, PROMPTS, 8)))
    rows = np.zeros((len(PROMPTS), 12), np.int32)
    for row, prompt, tokens in zip(rows, PROMPTS, tree.tokens_T, strict=True):
        row[: len(prompt) + 3] = [*prompt, *tokens]
    plain = np.asarray(read(jnp.asarray(rows)))
    for i, prompt in enumerate(PROMPTS):
        own = plain[i, len(prompt) : len(prompt) + 3]  # after the root, the first, the second
        np.testing.assert_allclose(hidden_BxTxD[i], own, atol=1e-4)
        # A head that likes the state at the first drafted token only.
        at = own[1] / np.linalg.norm(own[1]) ** 2
        closest = max(0, *(own[[0, 2]] @ at))
        assert closest < 0.999
        judge = get_rule("judge", head=JudgeHead(at, -(1 + closest) / 2))
        force_T = judge.force(jnp.asarray(hidden_BxTxD[i]))
        assert force_T.tolist() == [False, True, False]
        one = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), tree)
        free = next(t for t in range(12) if t not in one.tokens_T.tolist())
        reject_TxV = jnp.full((3, 12), -jnp.inf).at[:, free].set(0)  # wants something else
        noise = make_noise(jax.random.key(i), 3, 2)
        out = verify(noise, one, reject_TxV, judge, force_T)
        assert out.path_D.tolist() == [1, -1]
        assert out.tokens_A.tolist() == [int(one.tokens_T[1]), free, -1]


def test_lossy_rules_say_so():
    lossy = {n for n in specjax.verification.rule_names() if not get_rule(n).exact}
    assert lossy == {"typical", "lenient", "judge", "unverified"}
    assert lossy <= {r[0].name for r in RULES.values()}
