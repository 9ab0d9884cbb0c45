"""Node probabilities, recomputed from whole texts, are those that a round works with."""

import jax
import numpy as np
import pytest
from toys import toy_target

from specjax import decoding
from specjax.evaluation import anatomy
from specjax.evaluation.anatomy import node_probabilities, paths_to, tree_view
from specjax.generation import make_engine, start
from specjax.sampling import Sampling
from specjax.trained import init_drafter
from specjax.trees import chain

IDS = [3, 5, 1, 8, 2]


@pytest.fixture(scope="module")
def target():
    return toy_target()


DRAFTERS = {
    "fasteagle": {"num_layers": 3, "candidates": 2},
    "eagle3": {"steps": 3, "top_k": 2, "total_nodes": 9, "draft_vocab_size": 9},
}


@pytest.fixture(scope="module", params=DRAFTERS)
def drafted(request, target):
    """(drafter, tree, target's logits, text with its root) of a sampled tree, with its laws."""
    drafter = init_drafter(request.param, target, seed=3, **DRAFTERS[request.param])
    engine, params = make_engine(target, drafter, Sampling(1.0), (), "recursive_rejection")
    state = start(engine, params, [IDS], 20)
    for _ in range(2):  # a drafter's cache by then holds rows of rounds, not of the prompt alone
        state = decoding.jit_round(engine, params, state)
    text = state.tokens_BxS[0, : int(state.lengths_B[0])].tolist()
    tree, _ = jax.jit(decoding.draft, static_argnums=0)(engine, params, state)
    scored, _ = jax.jit(decoding.score, static_argnums=0)(engine, params, state.cache, tree)
    return drafter, tree, np.asarray(scored.logits_BxTxV[0]), text


def test_probabilities_are_those_of_the_round(target, drafted):
    drafter, tree, logits_TxV, text = drafted
    tokens, parents = np.asarray(tree.tokens_T[0]), np.asarray(tree.parent_T[0])
    q_T, p_T = node_probabilities(target, drafter, text, tree)
    law_TxV = np.exp(np.asarray(tree.law_TxV[0], np.float64))
    logits_TxV = logits_TxV.astype(np.float64)
    p_TxV = np.exp(logits_TxV - np.logaddexp.reduce(logits_TxV, axis=-1, keepdims=True))
    assert (q_T[0], p_T[0]) == (1, 1) and len(q_T) == len(tokens) > 5
    for row in range(1, len(tokens)):
        assert q_T[row] == pytest.approx(law_TxV[parents[row], tokens[row]], rel=1e-4, abs=1e-7)
        assert p_T[row] == pytest.approx(p_TxV[parents[row], tokens[row]], rel=1e-4, abs=1e-7)


def test_texts_of_one_bucket_compile_once(target):
    drafter = init_drafter("fasteagle", target, num_layers=2)
    tree = chain(2).draft(np.array([[2, 1, 4]]))
    before = anatomy._laws._cache_size()
    for ids in (IDS, [4, *IDS]):
        node_probabilities(target, drafter, ids, tree)
    assert anatomy._laws._cache_size() == before + 1


def test_a_view_shows_the_path_that_the_rule_took(target, drafted):
    class Words:
        def decode(self, ids):
            return "".join(f"<{token}>" for token in ids)

    drafter = drafted[0]
    worded = toy_target(tokenizer=Words())
    engine, params = make_engine(worded, drafter, stop_tokens=())
    state = start(engine, params, [IDS], 40)
    lengths = set()
    for _ in range(12):
        tree, _ = jax.jit(decoding.draft, static_argnums=0)(engine, params, state)
        scored, _ = jax.jit(decoding.score, static_argnums=0)(engine, params, state.cache, tree)
        out = jax.jit(decoding.verify, static_argnums=0)(engine, state, tree, scored)
        view = tree_view(worded, "toy", tree, out=out)
        before = int(state.lengths_B[0])
        state = decoding.jit_round(engine, params, state)
        new = state.tokens_BxS[0, before : int(state.lengths_B[0])].tolist()
        said = [view.labels[row] for row in view.path] + [view.extra]
        if not bool(state.done_B[0]):
            assert said == [f"<{token}>" for token in new]
        lengths.add(len(said))
    assert len(lengths) > 1  # some rounds accept, some do not


def test_paths_lead_down_from_the_root():
    assert paths_to([-1, 0, 0, 2, 3]) == [(), (1,), (2,), (2, 3), (2, 3, 4)]


def test_what_has_no_probability_is_refused(target):
    learned = init_drafter("fasteagle", target, num_layers=2)
    looked_up = init_drafter("prompt_lookup", target)
    cases = [
        (looked_up, IDS, [2, 1], "prompt_lookup' has no distribution"),
        (learned, IDS, [3, 1], "the tree's root the last"),
        (learned, [2], [2, 1], "two tokens at least"),
        (learned, IDS, [2, 1, 1, 1], "depth 3, but 'fasteagle' is trained for 2"),
    ]
    for drafter, ids, tokens, message in cases:
        tree = chain(len(tokens) - 1).draft(np.array([tokens]))
        with pytest.raises(ValueError, match=message):
            node_probabilities(target, drafter, ids, tree)
