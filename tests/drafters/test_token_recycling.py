"""Token recycling against dictionaries, lists and full forwards of the target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import PROMPTS, run_recording, toy_target

import specjax
from specjax.drafters import Committed, Context
from specjax.drafters.base import Scored
from specjax.drafters.token_recycling import Successors, TokenRecycling
from specjax.generation import make_engine, start

V, K, NODES = 12, 3, 8
SMALL = dict(successors=K, tree_nodes=NODES)


@pytest.fixture(scope="module")
def target():
    return toy_target()


def definition(**changes):
    return TokenRecycling(toy_target().config, **(SMALL | changes))


def path_of(topology, row):
    """Ranks from the root down to a row."""
    path = []
    while row:
        siblings = [c for c, p in enumerate(topology.parents) if p == topology.parents[row]]
        path.insert(0, siblings.index(row))
        row = topology.parents[row]
    return path


def walked(adjacency, topology, root):
    """[(token, valid)] of every row: from the root down its path, rank by rank."""
    rows = []
    for row in range(topology.nodes):
        token, valid = root, True
        for rank in path_of(topology, row):
            successors = adjacency[token].tolist()
            token = successors[rank]
            valid &= successors.index(token) == rank  # a repeated successor counts once
        rows.append((token, valid))
    return rows


def recycled(adjacency, tokens, valid, logits, k):
    """The matrix after every valid row has written its top k, in slot order."""
    matrix = dict(enumerate(adjacency.tolist()))
    for token, live, row in zip(tokens, valid, logits, strict=True):
        if live:
            matrix[int(token)] = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return np.array([matrix[token] for token in range(len(matrix))])


def learnt_from_pairs(adjacency, text, k):
    """The matrix after every pair of neighbours, in turn, went to the front of its row."""
    matrix = adjacency.tolist()
    for token, following in zip(text, text[1:], strict=False):
        row = matrix[token]
        if following in row:
            row.remove(following)
        matrix[token] = [following, *row][:k]
    return np.array(matrix)


def random_matrices(random, count, vocab, k):
    """Rows of distinct tokens, and some that are all zeros, as before anything is known."""
    rows = [
        [random.permutation(vocab)[:k] * (random.rand() < 0.8) for _ in range(vocab)]
        for _ in range(count)
    ]
    return np.array(rows, np.int32)


# ---- drafting and learning -----------------------------------------------------------------------


@pytest.mark.parametrize("nodes, k", [(80, 8), (8, 3), (1, 2), (7, 1)])
def test_the_draft_is_a_walk_along_the_matrix(nodes, k):
    drafter = definition(tree_nodes=nodes, successors=k)
    random = np.random.RandomState(nodes)
    adjacency = random_matrices(random, 40, V, k)
    roots = random.randint(V, size=40).astype(np.int32)
    context = Context(jnp.asarray(roots)[:, None], jnp.ones(40, jnp.int32))
    draft = jax.jit(lambda state: drafter.draft({}, {}, state, context, None)[0])
    tree = draft(Successors(jnp.asarray(adjacency)))
    for b in range(40):
        found = list(zip(tree.tokens_T[b].tolist(), tree.valid_T[b].tolist(), strict=True))
        assert found == walked(adjacency[b], drafter.topology, roots[b])
    np.testing.assert_array_equal(tree.parent_T[0], drafter.topology.parents)
    parents = np.maximum(np.asarray(tree.parent_T), 0)
    closed = np.take_along_axis(np.asarray(tree.valid_T), parents, axis=1)
    assert (closed | ~np.asarray(tree.valid_T)).all()


@pytest.mark.parametrize("vocab, k", [(12, 3), (700, 5)])  # the latter in blocks of 64
def test_every_valid_row_is_recycled_in_slot_order(vocab, k):
    """Few distinct tokens: most are met twice in a tree. A finished request learns nothing."""
    target = toy_target(vocab_size=vocab)
    drafter = TokenRecycling(target.config, successors=k, tree_nodes=NODES)
    random = np.random.RandomState(vocab)
    B, T = 30, drafter.nodes
    adjacency = random_matrices(random, B, vocab, k)
    tree = drafter.topology.draft(jnp.asarray(random.randint(6, size=(B, T)), jnp.int32))
    tree = tree.replace(valid_T=jnp.asarray(random.rand(B, T) < 0.7))
    logits = random.randint(0, 9, (B, T, vocab)).astype(np.float32)  # many ties
    counts = jnp.asarray(random.randint(3, size=B), jnp.int32)
    absorb = jax.jit(lambda state, rows, tree, s: drafter.absorb({}, state, rows, tree, s))
    scored, before = Scored(logits, None, None), Successors(jnp.asarray(adjacency))
    after = {}
    for accepted in (0, 1):  # whatever was accepted, the same is learnt
        tokens = jnp.full((B, drafter.depth + 1), accepted, jnp.int32)
        rows = Committed(tokens, None, counts * (1 + accepted))
        after[accepted] = np.asarray(absorb(before, rows, tree, scored).adjacency_BxVxk)
    np.testing.assert_array_equal(after[0], after[1])
    for b in range(B):
        live = np.asarray(tree.valid_T[b]) & (counts[b] > 0)
        expected = recycled(adjacency[b], np.asarray(tree.tokens_T[b]), live, logits[b], k)
        np.testing.assert_array_equal(after[0][b], expected)
    assert (np.asarray(counts) == 0).any() and (after[0] != adjacency).any()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_prompt_s_pairs_go_to_the_front_in_turn(k):
    drafter = definition(successors=k)
    random = np.random.RandomState(k)
    B, P = 30, 20
    (adjacency,) = random_matrices(random, 1, V, k)
    texts, lengths = random.randint(5, size=(B, P + 1)), random.randint(1, P + 1, B)
    texts[:, ::3] = random.randint(V, size=texts[:, ::3].shape)
    texts = texts.astype(np.int32)
    following = np.where(np.arange(P) < lengths[:, None], texts[:, 1:], random.randint(V))
    params = {"buffers": {"adjacency": jnp.asarray(adjacency)}}
    rows = Committed(jnp.asarray(following), None, jnp.asarray(lengths))
    context = Context(jnp.asarray(texts), jnp.asarray(lengths + 1))
    state = drafter.prefill(params, {}, (), rows, context)
    for b, n in enumerate(lengths):
        expected = learnt_from_pairs(adjacency, texts[b, : n + 1].tolist(), k)
        np.testing.assert_array_equal(state.adjacency_BxVxk[b], expected)
    cold = definition(successors=k, warm=False).prefill(params, {}, (), rows, context)
    np.testing.assert_array_equal(cold.adjacency_BxVxk, np.broadcast_to(adjacency, (B, V, k)))


# ---- decoding ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["warm", "cold"])
def decoded(request, target):
    """(drafter, record) of a batch, every round on record."""
    drafter = specjax.init_drafter("token_recycling", target, warm=request.param, **SMALL)
    engine, params = make_engine(target, drafter, stop_tokens=())
    _, record = run_recording(engine, params, start(engine, params, PROMPTS, 16))
    return drafter, record


def test_rounds_equal_a_slow_twin_of_full_forwards(target, decoded):
    """Each round: the path walk, a causal forward over every path, one write a row."""
    drafter, record = decoded
    topology = drafter.definition.topology
    rejected = 0
    for before, after in zip(record, record[1:], strict=False):
        texts = np.zeros((len(PROMPTS), topology.nodes, 64), np.int32)
        lengths, trees = np.zeros(texts.shape[:2], int), []
        for b, n in enumerate(before.lengths_B):
            committed = before.tokens_BxS[b, :n]
            adjacency = before.drafter.adjacency_BxVxk[b]
            trees.append(walked(adjacency, topology, committed[-1]))
            for row in range(topology.nodes):
                token, path = committed[-1], []
                for rank in path_of(topology, row):
                    token = adjacency[token][rank]
                    path.append(token)
                text = np.concatenate([committed, path]).astype(np.int32)
                texts[b, row, : len(text)], lengths[b, row] = text, len(text)
        flat = np.asarray(target.logits(texts.reshape(-1, 64)))
        last = flat[np.arange(len(flat)), lengths.reshape(-1) - 1].reshape(*lengths.shape, V)
        for b, count in enumerate(after.lengths_B - before.lengths_B):
            tokens, valid = zip(*trees[b], strict=True)
            adjacency = before.drafter.adjacency_BxVxk[b]
            live = np.array(valid) & (count > 0)
            expected = recycled(adjacency, tokens, live, last[b], K)
            np.testing.assert_array_equal(after.drafter.adjacency_BxVxk[b], expected)
            rejected += live.sum() - count
    assert rejected > 50


def test_the_committed_token_leads_its_predecessor_s_row(decoded):
    """At temperature 0, unless a later row of the tree had that token too."""
    drafter, record = decoded
    topology, seen = drafter.definition.topology, 0
    for before, after in zip(record, record[1:], strict=False):
        for b, n in enumerate(after.lengths_B):
            if n == before.lengths_B[b]:
                continue
            tree = walked(
                before.drafter.adjacency_BxVxk[b],
                topology,
                before.tokens_BxS[b, before.lengths_B[b] - 1],
            )
            previous, newest = after.tokens_BxS[b, n - 2 : n]
            if sum(valid and token == previous for token, valid in tree) == 1:
                assert after.drafter.adjacency_BxVxk[b][previous][0] == newest
                seen += 1
    assert seen > 3


def test_an_empty_matrix_still_decodes_exactly(target):
    plain = specjax.generate(target, PROMPTS, max_new_tokens=16, stop_tokens=())
    drafter = specjax.init_drafter("token_recycling", target, warm=False, **SMALL)
    assert not drafter.params["buffers"]["adjacency"].any() and drafter.num_params == 0
    out = specjax.generate(target, PROMPTS, drafter, 16, stop_tokens=())
    assert out.tokens == plain.tokens


# ---- from one request to the next ----------------------------------------------------------------


def test_what_is_kept_is_what_the_next_request_drafts_from(target, tmp_path):
    fresh = specjax.init_drafter("token_recycling", target, warm=False, **SMALL)
    first = specjax.generate(target, PROMPTS[2:3], fresh, 16, stop_tokens=())
    kept = first.drafter
    assert not fresh.params["buffers"]["adjacency"].any()  # the one given stays as it was
    adjacency = np.asarray(kept.params["buffers"]["adjacency"])
    assert adjacency.shape == (V, K) and adjacency.dtype == np.int32 and adjacency.any()

    engine, params = make_engine(target, kept, stop_tokens=())
    state = start(engine, params, PROMPTS, 16)
    context = Context(state.tokens_BxS, state.lengths_B)
    tree, _ = engine.drafter.draft(params["drafter"], target.params, state.drafter, context, None)
    for b, root in enumerate(np.asarray(context.root_B())):
        rows = list(zip(tree.tokens_T[b].tolist(), tree.valid_T[b].tolist(), strict=True))
        assert rows == walked(adjacency, engine.drafter.topology, root)

    again = specjax.generate(target, PROMPTS[2:3], kept, 16, stop_tokens=())
    assert again.tokens == first.tokens
    assert len(again.accept_lengths[0]) < len(first.accept_lengths[0])  # it has seen this before

    kept.save(tmp_path)
    loaded = specjax.load_drafter(tmp_path, target)
    assert loaded.definition == kept.definition
    np.testing.assert_array_equal(loaded.params["buffers"]["adjacency"], adjacency)


def test_requests_of_a_batch_learn_apart(target):
    drafter = specjax.init_drafter("token_recycling", target, **SMALL)
    engine, params = make_engine(target, drafter, stop_tokens=())
    together, _ = run_recording(engine, params, start(engine, params, PROMPTS, 16))
    for b, prompt in enumerate(PROMPTS):
        alone, _ = run_recording(engine, params, start(engine, params, [prompt], 16))
        np.testing.assert_array_equal(
            together.drafter.adjacency_BxVxk[b], alone.drafter.adjacency_BxVxk[0]
        )


def test_later_requests_of_a_batch_win_where_they_changed_something():
    random = np.random.RandomState(0)
    drafter, B = definition(), 5
    before, *after = random_matrices(random, B + 1, V, K)
    after = np.where(random.rand(B, V, 1) < 0.3, after, before)
    expected = before.copy()
    for matrix in after:
        for token in range(V):
            if (matrix[token] != before[token]).any():
                expected[token] = matrix[token]
    params = {"buffers": {"adjacency": jnp.asarray(before), "other": 1}, "more": 2}
    kept = drafter.keep(params, Successors(jnp.asarray(after)))
    np.testing.assert_array_equal(kept["buffers"]["adjacency"], expected)
    assert kept["more"] == 2 and kept["buffers"]["other"] == 1
    np.testing.assert_array_equal(params["buffers"]["adjacency"], before)


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes, k", [(80, 8), (16, 8), (1, 1), (5, 1), (40, 2)])
def test_trees_of_any_size(nodes, k):
    drafter = definition(tree_nodes=nodes, successors=k)
    assert drafter.nodes == drafter.topology.nodes == nodes + 1
    assert drafter.depth == drafter.topology.max_depth
    assert drafter.topology.child_TxC.shape[1] <= k
    small = drafter.with_budget(tree_nodes=1)
    assert (small.nodes, small.depth, small.successors) == (2, 1, k)


@pytest.mark.parametrize("field, value", [("successors", 0), ("successors", 13), ("tree_nodes", 0)])
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        definition(**{field: value})
