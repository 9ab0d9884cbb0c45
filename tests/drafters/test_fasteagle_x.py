"""FastEagle X against brute force: whole laws written down, every path enumerated."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import PROMPTS, prefilled, toy_target

import specjax
from specjax import decoding
from specjax.drafters import FastEagleX
from specjax.drafters.features import last_rows
from specjax.evaluation.best_paths import best_paths, count_prefixes
from specjax.generation import make_engine
from specjax.sampling import Sampling
from specjax.verification import get_rule

N, V = 3, 12
WORDS = np.array([0, 2, 3, 5, 6, 8, 9, 11])
BUSHY = ((0,), (1,), (3,), (0, 0), (0, 2), (1, 0), (0, 0, 0), (1, 0, 1))


def unsettled(drafter):
    """The same drafter with transition biases that matter."""
    rng = np.random.default_rng(3)
    params = dict(drafter.params)
    params["transition"] = [
        jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), layer)
        for layer in params["transition"]
    ]
    return dataclasses.replace(drafter, params=params)


@pytest.fixture(scope="module")
def target():
    return toy_target()


def make(target, words=True, **config):
    config = dict(num_layers=N, rank=4, pool=len(WORDS) if words else V) | config
    if words:
        config |= dict(draft_vocab_size=len(WORDS))
    ids = WORDS if words else None
    return unsettled(specjax.init_drafter("fasteagle_x", target, 2, vocab_ids=ids, **config))


def drafted(target, drafter, sampling=None, rule=None, rounds=0):
    """(engine, a state, the tree drafted there, depth's states) of the standard prompts."""
    sampling = sampling or Sampling()
    engine, params = make_engine(target, drafter, sampling, (), rule)
    state = prefilled(engine, params, PROMPTS, 20)
    for _ in range(rounds):
        state = decoding.jit_round(engine, params, state)
    tree, _ = jax.jit(decoding.draft, static_argnums=0)(engine, params, state)
    definition = engine.drafter
    own = state.drafter
    hidden, _ = definition.extend(params["drafter"], target.params, own.cache, own.pending)
    states = jnp.stack([last_rows(h, own.pending.counts_B) for h in hidden], axis=1)
    return state, jax.device_get(tree), states


def law(target, drafter, states_NxD, depth, parent):
    """log q over the draft vocabulary, written down: one node at a time, in float64."""
    definition, params = drafter.definition, drafter.params
    read = np.asarray(definition.normed(params, states_NxD[None]))[0, depth - 1].astype(float)
    e = np.asarray(target.params["embed"])[parent].astype(float)
    e = e / np.sqrt((e**2).mean() + target.config.rms_norm_eps)
    own = {k: np.asarray(w, float) for k, w in params["transition"][depth - 1].items()}
    x = e @ own["shift_down"]
    read = read + (x / (1 + np.exp(-x))) @ own["shift_up"]
    logits = np.asarray(target.params["head"], float) @ read
    ids = WORDS if definition.draft_vocab_size else np.arange(V)
    return ids, logits[ids] - np.logaddexp.reduce(logits[ids])


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("rounds", [0, 2])
def test_every_node_is_the_child_of_its_rank_given_its_parent(target, words, rounds):
    drafter = make(target, words, paths=BUSHY)
    state, tree, states = drafted(target, drafter, rounds=rounds)
    topology = drafter.definition.topology
    for b in range(len(PROMPTS)):
        assert tree.tokens_T[b, 0] == state.tokens_BxS[b, state.lengths_B[b] - 1]
        for row in range(topology.nodes):
            children = [c for c in topology.child_TxC[row] if c >= 0]
            if children:
                depth = topology.depth_T[row] + 1
                ids, logq = law(target, drafter, states[b], depth, tree.tokens_T[b, row])
                ranked = ids[np.argsort(-logq)]
                expected = dict(enumerate(ranked))
                # Children stand in row order; their ranks are those of BUSHY's paths.
                assert list(tree.tokens_T[b, children]) == [
                    expected[r] for r in ranks_of(topology, row)
                ]


def ranks_of(topology, row):
    """Ranks of a node's children: `paths` sorts siblings, ranks may skip."""
    order = sorted({p[:i] for p in BUSHY for i in range(len(p) + 1)}, key=lambda p: (len(p), p))
    path = order[row]
    return [p[-1] for p in order if len(p) == len(path) + 1 and p[:-1] == path]


def test_different_parents_have_different_candidates(target):
    tree = drafted(target, make(target, paths=BUSHY))[1]
    assert (tree.tokens_T[:, 4] != tree.tokens_T[:, 6]).any()  # (0, 0) and (1, 0)


@pytest.mark.parametrize("rule", ["traversal", "block"])
def test_laws_are_those_the_children_were_drawn_from(target, rule):
    shape = dict(candidates=2) if rule == "traversal" else dict(candidates=1)
    drafter = make(target, **shape)
    _, tree, states = drafted(target, drafter, Sampling(1.0), get_rule(rule))
    topology = drafter.definition.topology
    for b, row in itertools.product(range(len(PROMPTS)), range(topology.nodes)):
        if topology.child_TxC[row][0] < 0:
            continue
        depth = topology.depth_T[row] + 1
        ids, logq = law(target, drafter, states[b], depth, tree.tokens_T[b, row])
        expected = np.zeros(V)
        expected[ids] = np.exp(logq)
        np.testing.assert_allclose(np.exp(tree.law_TxV[b, row]), expected, atol=2e-5)


def test_the_grown_tree_holds_the_best_paths_of_all(target):
    """With as many candidates as there are tokens nothing is out of reach: enumerate them all."""
    T = 11
    drafter = make(target, words=False, candidates=V, total_nodes=T)
    _, tree, states = drafted(target, drafter)
    for b in range(len(PROMPTS)):
        root, scores = int(tree.tokens_T[b, 0]), {}
        laws = {}

        def logq(depth, parent, b=b, laws=laws):
            if (depth, parent) not in laws:
                laws[depth, parent] = law(target, drafter, states[b], depth, parent)[1]
            return laws[depth, parent]

        for path in itertools.product(range(V), repeat=N):
            score, parent = 0.0, root
            for depth, token in enumerate(path, start=1):
                score += logq(depth, parent)[token]
                parent = token
                scores[path[:depth]] = score
        best = set(sorted(scores, key=lambda p: -scores[p])[: T - 1])
        found = set()
        for row in range(1, T):
            path, v = [], row
            while v:
                path.append(int(tree.tokens_T[b, v]))
                v = tree.parent_T[b, v]
            found.add(tuple(reversed(path)))
        assert found == best


def test_a_small_pool_only_hides_what_lies_outside_it(target):
    """Ranks inside the pool are the whole law's, restricted to the pool."""
    wide, narrow = (make(target, words=False, candidates=2, pool=p) for p in (V, 4))
    _, tree, states = drafted(target, narrow)
    plain = dataclasses.replace(wide.definition, rank=0)
    for b in range(len(PROMPTS)):
        for depth in (1, 2, 3):
            read = plain.normed(narrow.params, states[b][None])[0, depth - 1]
            marginal = np.asarray(target.params["head"] @ read)
            pool = np.argsort(-marginal)[:4]
            parent_row = depth - 1
            _, logq = law(target, narrow, states[b], depth, tree.tokens_T[b, parent_row])
            ranked = pool[np.argsort(-logq[pool])]
            assert tree.tokens_T[b, depth] == ranked[0]  # the backbone
            assert tree.tokens_T[b, N + depth] == ranked[1]  # its leaf


def test_without_a_bias_it_is_fasteagle(target):
    shape = dict(num_layers=N, candidates=3)
    ours = specjax.init_drafter("fasteagle_x", target, 2, rank=0, **shape)
    theirs = specjax.init_drafter("fasteagle", target, 2, **shape)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    fresh = specjax.init_drafter("fasteagle_x", target, 2, rank=4, **shape)  # starts without one
    trees = [drafted(target, d)[1] for d in (ours, theirs, fresh)]
    for tree in trees[1:]:
        jax.tree.map(np.testing.assert_array_equal, trees[0], tree)
    # On other trees too: what draws depths at once is what walks from parent to parent.
    once, walked = (drafted(target, d.with_budget(paths=BUSHY))[1] for d in (ours, fresh))
    jax.tree.map(np.testing.assert_array_equal, once, walked)
    assert once.tokens_T.shape[1] == len(BUSHY) + 1


def test_training_sees_the_laws_that_decoding_draws_from(target):
    """Row t of `teach`, depth i, given x_{t+i}: the law behind the drafted chain's next token."""
    drafter = make(target, words=False, candidates=1)
    _, tree, states = drafted(target, drafter)
    definition = drafter.definition
    texts = np.zeros((len(PROMPTS), 16), int)
    for row, prompt, chain in zip(texts, PROMPTS, tree.tokens_T, strict=True):
        row[: len(prompt) + N + 1] = [*prompt, *chain]  # root and chain: x_{t+1}..
    taps = specjax.models.transformer.forward(
        target.params, target.config, jnp.asarray(texts), taps=definition.taps
    ).taps_BxTxM
    hidden, _ = definition.teach(drafter.params, target.params, taps, jnp.asarray(texts))
    read = [definition.logits(drafter.params, target.params, h) for h in hidden]
    for b, prompt in enumerate(PROMPTS):
        for depth, logits_BxTxV in enumerate(read, start=1):
            logits = logits_BxTxV[b, len(prompt) - 1]
            _, logq = law(target, drafter, states[b], depth, tree.tokens_T[b, depth - 1])
            np.testing.assert_allclose(jax.nn.log_softmax(logits), logq, atol=1e-4)


# ---- trees from counts ---------------------------------------------------------------------------


def test_the_best_paths_beat_every_other_tree(target):
    """All prefix-closed trees of five rows, scored on the text by walking it."""
    drafter = make(target, words=True, paths=BUSHY)
    rng = np.random.default_rng(0)
    rows = {"tokens": rng.integers(V, size=(8, 10)), "supervised": np.ones((8, 10), bool)}
    counts, positions = count_prefixes(target, drafter, rows, widest=3)
    assert positions == 8 * (10 - N - 1)
    paths, tau = best_paths(target, drafter, rows, nodes=5, widest=3)
    nodes = [p for n in (1, 2, 3) for p in itertools.product(range(3), repeat=n)]

    def value(tree):
        return 1 + sum(counts[p] for p in tree) / positions

    closed = lambda tree: all(p[:-1] in tree or len(p) == 1 for p in tree)  # noqa: E731
    found = [t for t in itertools.combinations(nodes, 4) if closed(t)]
    assert value(paths) == pytest.approx(tau) and closed(paths)
    assert tau == pytest.approx(max(map(value, found)))
    assert specjax.init_drafter("fasteagle_x", target, num_layers=N, paths=paths)


def test_ranks_are_those_of_the_written_law(target):
    drafter = make(target, words=True, candidates=1)
    definition = drafter.definition
    text = np.random.default_rng(1).integers(V, size=(1, 9))
    rows = {"tokens": np.repeat(text, 4, axis=0), "supervised": np.ones((4, 9), bool)}
    counts, positions = count_prefixes(target, drafter, rows, widest=V)
    taps = specjax.models.transformer.forward(
        target.params, target.config, jnp.asarray(text), taps=definition.taps
    ).taps_BxTxM
    hidden, _ = definition.unroll(
        drafter.params, target.params, taps, jnp.asarray(np.pad(text[:, 1:], ((0, 0), (0, 1))))
    )
    states = np.stack([np.asarray(h[0]) for h in hidden], axis=1)  # row x depth x D
    expected = {}
    for t in range(9 - N - 1):
        path = ()
        for depth in range(1, N + 1):
            ids, logq = law(target, drafter, jnp.asarray(states[t]), depth, text[0, t + depth])
            label = text[0, t + 1 + depth]
            if label not in ids:
                break
            path += (int((logq > logq[list(ids).index(label)]).sum()),)
            expected[path] = expected.get(path, 0) + 4
    assert dict(counts) == expected and positions == 4 * (9 - N - 1)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(rank=-1), "rank: -1"),
        (dict(pool=2, candidates=3, rank=4), "pool: 2 .*candidates=3"),
        (dict(pool=2, candidates=3, total_nodes=9), "pool: 2 .*candidates=3"),
        (dict(paths=((0,),), total_nodes=5), "paths, total_nodes"),
        (dict(paths=((0,) * 4,)), "paths: depth 4 exceeds num_layers=3"),
        (dict(paths=((9,),), rank=4), "paths: rank 9 .*pool of 8"),
        (dict(total_nodes=3), "total_nodes: 3 must exceed depth=3"),
        (dict(candidates=2, total_nodes=12), "total_nodes: 12 .*at most 11"),
    ],
)
def test_bad_fields_are_named(target, config, message):
    with pytest.raises(ValueError, match=message):
        specjax.init_drafter("fasteagle_x", target, **(dict(num_layers=3) | config))


def test_a_pool_that_nothing_reads_bounds_nothing(target):
    """Without a bias static trees are FastEagle's, whose fields mean what they mean there."""
    make = lambda **config: FastEagleX(target.config, num_layers=2, **config)  # noqa: E731
    assert make(candidates=10).nodes == 21 and make(paths=((9,),)).nodes == 2
    with pytest.raises(ValueError, match="paths: rank 12 .*pool of 12"):
        make(paths=((12,),))


def test_a_grown_tree_is_refused_where_tokens_are_drawn(target):
    """It is made of best tokens, which have no law; no other tree takes its place unasked."""
    grown = make(target, words=False, candidates=3, total_nodes=9)
    assert grown.definition.proposals == ("top",)
    with pytest.raises(ValueError, match="fasteagle_x"):
        specjax.generate(target, [[1, 2]], grown, 4, temperature=1.0, rule="traversal")
