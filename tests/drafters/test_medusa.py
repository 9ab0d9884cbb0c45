"""Medusa's heads: what each reads, what its tree holds, and where the hidden state comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import PROMPTS, prefilled, run_recording, toy_target

import specjax
from specjax import decoding
from specjax.drafters.medusa import FADE, FIRST, MedusaState, default_paths
from specjax.generation import make_engine
from specjax.models.transformer import forward, head_VxD
from specjax.trees import best_first, paths

HEADS, BLOCKS, D, VOCAB = 3, 2, 16, 12
WORDS = np.array([0, 2, 3, 5, 6, 8, 9, 11])  # draft vocabulary
GAPS = ((1,), (0, 2, 0), (0, 0))  # ranks left out, prefixes to be added


@pytest.fixture(scope="module")
def target():
    return toy_target()


def perturbed(drafter, scale=0.5):
    """The same drafter with random weights in every block."""
    rng = np.random.default_rng(5)
    shake = lambda w: jnp.asarray(scale * rng.normal(size=w.shape), jnp.float32)  # noqa: E731
    heads = jax.tree.map(shake, drafter.params["heads"])
    return specjax.trained.TrainedDrafter(
        drafter.definition, drafter.params | {"heads": heads}, drafter.fingerprint
    )


@pytest.fixture(scope="module")
def drafter(target):
    fields = dict(heads=HEADS, blocks=BLOCKS, draft_vocab_size=len(WORDS), paths=GAPS)
    return perturbed(specjax.init_drafter("medusa", target, vocab_ids=WORDS, **fields))


def slow_logits(target, params, hidden_D):
    """Logits of every head in float64, one block after another."""
    rows = np.asarray(head_VxD(target.params), np.float64)[WORDS]
    out = []
    for head in params["heads"]:
        x = np.asarray(hidden_D, np.float64)
        for block in head:
            z = x @ np.asarray(block["fc"], np.float64) + np.asarray(block["bias"], np.float64)
            x = x + z / (1 + np.exp(-z))
        out.append(rows @ x)
    return np.stack(out)


# ---- heads ---------------------------------------------------------------------------------------


def test_every_fresh_head_is_the_target_s_own(target):
    fresh = specjax.init_drafter("medusa", target, heads=HEADS, blocks=BLOCKS)
    tokens = np.random.default_rng(0).integers(VOCAB, size=(2, 7)).astype(np.int32)
    definition = fresh.definition
    out = forward(target.params, target.config, tokens, taps=definition.taps)
    hidden, _ = definition.teach(fresh.params, target.params, out.taps_BxTxM, tokens)
    assert len(hidden) == definition.unrolled == HEADS
    for h in hidden:
        logits = definition.logits(fresh.params, target.params, h)
        np.testing.assert_allclose(logits, target.logits(tokens), atol=1e-5)


def test_blocks_have_weights_of_their_own(drafter):
    """Each block of each head moves its own head and no other."""
    definition, base = drafter.definition, drafter.params
    x = np.random.default_rng(1).normal(size=(1, 4, D)).astype(np.float32)
    teach = jax.jit(lambda p: jnp.stack(definition.teach(p, None, x, None)[0]))
    whole = teach(base)
    for i in range(HEADS):
        for j in range(BLOCKS):
            heads = [list(head) for head in base["heads"]]
            heads[i][j] = jax.tree.map(lambda w: w + 0.1, heads[i][j])
            moved = np.abs(np.asarray(teach(base | {"heads": heads}) - whole)).max(axis=(1, 2, 3))
            assert (moved > 1e-3).tolist() == [h == i for h in range(HEADS)]


def test_only_the_heads_are_trained(target, drafter):
    definition = drafter.definition
    x = np.random.default_rng(1).normal(size=(1, 4, D)).astype(np.float32)

    def loss(heads, target_params):
        params = drafter.params | {"heads": heads}
        hidden, _ = definition.teach(params, target_params, x, None)
        out = [definition.logits(params, target_params, h) for h in hidden]
        return -sum(jnp.sum(jax.nn.log_softmax(logits)[..., 0]) for logits in out)

    fresh = jax.tree.map(jnp.zeros_like, drafter.params["heads"])
    ours, target_s = jax.jit(jax.grad(loss, argnums=(0, 1)))(fresh, target.params)
    assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(ours))  # though they start at zero
    assert all((g == 0).all() for g in jax.tree.leaves(target_s))


# ---- drafting ------------------------------------------------------------------------------------


def test_a_node_holds_its_head_s_token_of_its_rank(target, drafter):
    definition = drafter.definition
    nodes = ((0,), (1,), (0, 0), (0, 2), (0, 2, 0))
    assert definition.paths == nodes and definition.topology == paths(nodes)
    assert (definition.depth, definition.nodes) == (3, 6)
    hidden = np.random.default_rng(2).normal(size=(4, D)).astype(np.float32)
    context = specjax.drafters.Context(
        jnp.asarray(np.arange(8).reshape(4, 2)), jnp.asarray([2, 1, 2, 1])
    )
    draft = jax.jit(definition.draft)
    tree, state = draft(drafter.params, target.params, MedusaState(hidden), context, None)
    assert state.hidden_BxD is hidden or (np.asarray(state.hidden_BxD) == hidden).all()
    assert tree.tokens_T[:, 0].tolist() == [1, 2, 5, 6]
    for b in range(4):
        order = np.argsort(-slow_logits(target, drafter.params, hidden[b]), axis=1)
        expected = [WORDS[order[len(path) - 1, path[-1]]] for path in nodes]
        assert tree.tokens_T[b, 1:].tolist() == expected


def recorded(target, drafter, rule=None):
    engine, params = make_engine(target, drafter, stop_tokens=())
    state = prefilled(engine, params, PROMPTS, [24, 24, 5, 23])
    return engine, params, run_recording(engine, params, state)[1]


def test_the_state_is_the_target_s_hidden_state_at_the_last_committed_row(target, drafter):
    engine, _, record = recorded(target, drafter)
    out = forward(target.params, target.config, jnp.asarray(record[-1].tokens_BxS))
    hidden = np.asarray(out.hidden_BxTxD)
    counts = set()
    for before, after in zip(record, record[1:], strict=False):
        counts |= set((after.lengths_B - before.lengths_B).tolist())
    assert {0, 1, 2} <= counts  # rows that are done included
    for state in record:
        last = hidden[np.arange(len(PROMPTS)), state.lengths_B - 2]
        np.testing.assert_allclose(state.drafter.hidden_BxD, last, atol=1e-4)


def test_teaching_aligns_with_drafting(target, drafter):
    """Row t of the teacher-forced pass is the round whose root is x_{t+1}, at every depth."""
    engine, params, record = recorded(target, drafter)
    definition, texts = drafter.definition, jnp.asarray(record[-1].tokens_BxS)
    out = forward(target.params, target.config, texts, taps=definition.taps)
    hidden, _ = definition.teach(drafter.params, target.params, out.taps_BxTxM, texts)
    logits = [definition.logits(drafter.params, target.params, h) for h in hidden]
    order = np.argsort(-np.stack(logits), axis=-1)  # depth x request x row x rank
    redraft = jax.jit(decoding.draft, static_argnums=0)
    for state in record:
        state = state.replace(keys_B=jax.random.split(jax.random.key(0), len(PROMPTS)))
        tree, _ = redraft(engine, params, state)
        for b, row in enumerate(state.lengths_B - 2):
            ranked = [order[len(path) - 1, b, row, path[-1]] for path in definition.paths]
            assert tree.tokens_T[b, 1:].tolist() == WORDS[ranked].tolist()


# ---- trees ---------------------------------------------------------------------------------------


def test_the_default_tree_is_the_best_under_what_it_assumes(target):
    chances = [[FIRST * FADE**i / (r + 1) ** 2 for r in range(10)] for i in range(4)]
    assert all(sum(level) < 1 for level in chances)
    definition = specjax.drafters.DRAFTERS["medusa"](target.config, tree_nodes=11)
    assert definition.topology == paths(best_first(chances, 11))
    assert definition.nodes == 12
    small = definition.with_budget(tree_nodes=3, draft_depth=1)
    assert small.topology.parents == (-1, 0, 0, 0) and small.depth == 1
    default = definition.with_budget(tree_nodes=0)
    assert default.nodes == 17 and default.unrolled == small.unrolled == 4
    assert default_paths(3, 3) == ((0,), (1,), (0, 0))


def test_chains_are_as_many_as_the_nodes_feed(target):
    definition = specjax.drafters.DRAFTERS["medusa"](target.config, tree_nodes=11)
    depth = definition.depth
    many = definition.drawn("chains", specjax.sampling.Sampling(1.0))
    assert many.depth == depth and many.nodes == 1 + 11 // depth * depth
    assert many.topology.only_last_moves is (11 // depth == 1)


def test_a_tree_from_a_file_is_the_same_tree(target, drafter, tmp_path):
    drafter.save(tmp_path)
    loaded = specjax.load_drafter(tmp_path, target)
    assert loaded.definition == drafter.definition
    assert hash(loaded.definition) == hash(drafter.definition)
    again = drafter.definition.with_budget(paths=[[0, 2, 0], [1], [0, 0]])
    assert again == drafter.definition
    assert drafter.definition.with_budget(paths=(), tree_nodes=4).nodes == 5


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(heads=0), "heads"),
        (dict(blocks=0), "blocks"),
        (dict(draft_depth=5), "draft_depth"),
        (dict(draft_depth=-1), "draft_depth"),
        (dict(tree_nodes=-1), "tree_nodes"),
        (dict(draft_depth=1, tree_nodes=11), "tree_nodes: 11.*10.*1 levels"),
        (dict(paths=((0,),), tree_nodes=3), "paths.*tree_nodes"),
        (dict(paths=((0,),), draft_depth=2), "paths.*draft_depth"),
        (dict(paths=((0,) * 5,)), "paths: depth 5"),
        (dict(paths=((12,),)), "paths.*rank 12"),
        (dict(paths=((8,),), draft_vocab_size=8), "paths.*rank 8"),
        (dict(paths=((-1,),)), "paths"),
        (dict(draft_vocab_size=13), "draft_vocab_size"),
    ],
)
def test_bad_fields_are_named(target, fields, match):
    with pytest.raises(ValueError, match=match):
        specjax.init_drafter("medusa", target, **fields)
