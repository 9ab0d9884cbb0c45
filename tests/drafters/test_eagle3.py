"""EAGLE-3: what is trained is what is decoded, and its dynamic tree is EAGLE-2's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_target, whole_prompt

import specjax
from specjax.drafters import Eagle3
from specjax.drafters.base import Committed, Context
from specjax.models.transformer import head_VxD

STEPS, T = 4, 12  # unrolled steps, rows of the teacher-forced pass
WORDS = np.array([0, 2, 3, 5, 6, 8, 9, 11])  # draft vocabulary
TREES = {"chain": dict(top_k=1), "tree": dict(top_k=3, total_nodes=13)}


@pytest.fixture(scope="module")
def target():
    return toy_target()


@pytest.fixture(scope="module")
def params(target):
    config = dict(steps=STEPS, draft_vocab_size=len(WORDS))
    params = specjax.init_drafter("eagle3", target, seed=3, vocab_ids=WORDS, **config).params
    return params | {"norm": {"scale": 3 * params["norm"]["scale"]}}  # peaked: trees grow deep


@pytest.fixture(scope="module")
def definition(target):
    return Eagle3(target.config, steps=STEPS, draft_vocab_size=len(WORDS))


@pytest.fixture(scope="module")
def text(definition):
    """(x_0 .. x_T, tokens of the rows, features of the rows); row t holds x_{t+1}."""
    rng = np.random.default_rng(0)
    text = rng.integers(12, size=T + 1)
    width = len(definition.taps) * definition.target.hidden_size
    return text, text[1:], rng.normal(size=(T, width)).astype(np.float32)


@pytest.fixture(scope="module")
def unrolled(target, definition, params, text):
    """Hidden states, step x variant x row x D; variant 1 + t has another token in row t."""
    _, tokens, taps = text
    variants = np.repeat(tokens[None], T + 1, axis=0)
    variants[1:] = (variants[1:] + np.eye(T, dtype=int)) % 12

    @jax.jit
    def run(params, target_params, taps, tokens):
        taps = jnp.broadcast_to(taps, (T + 1, *taps.shape))
        return jnp.stack(definition.unroll(params, target_params, taps, tokens)[0])

    return jax.device_get(run(params, target.params, taps, variants))


# ---- training-time test --------------------------------------------------------------------------


def test_unrolling_equals_decoding_the_same_tokens_step_by_step(target, params, text, unrolled):
    """From every row, the cached chain of `draft`, made to draw the text's own tokens."""
    words, tokens, taps = text
    rows = np.arange(T - STEPS + 1)
    B = len(rows)
    truth = np.stack([tokens[rows + level] for level in range(1, STEPS)] + [tokens[rows]], axis=1)
    seen = []

    class Forced(Eagle3):
        def logits(self, params, target_params, hidden_Bx1xD):
            seen.append(hidden_Bx1xD[:, 0])
            return jax.nn.one_hot(truth[:, len(seen) - 1], 12)[:, None]

    definition = Forced(target.config, steps=STEPS)

    @jax.jit
    def run(params, target_params):
        state = definition.init_state(B, T + 8, jnp.float32)
        repeat = lambda x: jnp.repeat(jnp.asarray(x)[None], B, axis=0)  # noqa: E731
        committed = Committed(repeat(tokens), repeat(taps), jnp.asarray(rows + 1))
        state = definition.prefill(params, target_params, state, committed, whole_prompt(committed))
        context = Context(repeat(words), jnp.asarray(rows + 2))
        tree, _ = definition.draft(params, target_params, state, context, None)
        return tree.tokens_T, jnp.stack(seen)

    drawn, hidden = jax.device_get(run(params, target.params))
    np.testing.assert_array_equal(drawn[:, 1:STEPS], truth[:, : STEPS - 1])
    np.testing.assert_allclose(hidden, unrolled[:, 0, rows], atol=2e-5)


def test_step_i_of_row_t_reads_tokens_up_to_x_t_plus_1_plus_i(unrolled):
    moved = np.abs(unrolled[:, 1:] - unrolled[:, :1]).max(axis=3)  # step x token changed x row
    changed, row = np.arange(T)[:, None], np.arange(T)
    for i in range(STEPS):
        reads = changed <= row + i
        assert (moved[i][reads] > 1e-6).all()
        assert (moved[i][~reads] == 0).all()


# ---- drafting ------------------------------------------------------------------------------------

ROWS = np.array([T, 6, 1])  # committed rows of each request


def drafted(target, definition, params, text):
    """The tree that each request of ROWS drafts after prefilling its rows."""
    words, tokens, taps = text

    @jax.jit
    def run(params, target_params):
        B = len(ROWS)
        repeat = lambda x: jnp.repeat(jnp.asarray(x)[None], B, axis=0)  # noqa: E731
        state = definition.init_state(B, T + 4 + definition.scratch, jnp.float32)
        committed = Committed(repeat(tokens), repeat(taps), jnp.asarray(ROWS))
        state = definition.prefill(params, target_params, state, committed, whole_prompt(committed))
        context = Context(repeat(words), jnp.asarray(ROWS + 1))
        return definition.draft(params, target_params, state, context, None)[0]

    return jax.device_get(run(params, target.params))


class SlowTwin:
    """EAGLE-2's tree without a cache: one causal pass over prefix and path for every node."""

    def __init__(self, target, definition, params, text):
        self.K, self.depth, self.kept = definition.top_k, definition.depth, definition.nodes - 1
        self.tokens, self.R = text[1], T + definition.depth
        self.features = np.asarray(jax.jit(definition.fuse)(params, text[2][None]))[0]
        positions, mask = np.arange(self.R)[None], np.tril(np.ones((1, self.R, self.R), bool))

        @jax.jit
        def one_pass(g, tokens):
            x, _ = definition.step(params, target.params, g, tokens, positions, mask, None)
            return x, definition.logits(params, target.params, x)

        self.one_pass = one_pass

    def last(self, rows, hidden, path):
        """(output, log-probabilities) of the last row, after the path's tokens and features."""
        g = np.zeros((1, self.R, self.features.shape[1]), np.float32)
        tokens = np.zeros((1, self.R), int)
        g[0, :rows], tokens[0, :rows] = self.features[:rows], self.tokens[:rows]
        for i, (feature, token) in enumerate(zip(hidden, path, strict=True), start=rows):
            g[0, i], tokens[0, i] = feature, token
        x, logits = self.one_pass(g, tokens)
        at = rows + len(path) - 1
        logits = np.asarray(logits)[0, at].astype(np.float64)
        return np.asarray(x)[0, at], logits - np.log(np.exp(logits).sum())

    def draft(self, rows):
        """Kept nodes as [(parent row, token, depth)], in the order they were made."""
        pool = []  # (score, parent in the pool or -1, path, hidden states along it)

        def expand(parent, score, path, hidden):
            x, logp = self.last(rows, hidden, path)
            for word in np.argsort(-logp)[: self.K]:
                token = int(WORDS[word])
                pool.append((score + logp[word], parent, [*path, token], [*hidden, x]))

        expand(-1, 0.0, [], [])
        frontier = list(range(self.K))
        for _ in range(self.depth - 1):
            made = len(pool)
            for node in frontier:
                expand(node, pool[node][0], *pool[node][2:])
            frontier = sorted(range(made, len(pool)), key=lambda n: -pool[n][0])[: self.K]
        best = sorted(range(len(pool)), key=lambda n: -pool[n][0])[: self.kept]
        row = {node: i for i, node in enumerate(sorted(best), start=1)} | {-1: 0}
        return [(row[pool[n][1]], pool[n][2][-1], len(pool[n][2])) for n in sorted(best)]


@pytest.mark.parametrize("name", TREES)
def test_the_draft_is_what_expand_and_rerank_gives(target, params, text, name):
    """A chain is the same with one candidate."""
    definition = Eagle3(target.config, steps=STEPS, draft_vocab_size=len(WORDS), **TREES[name])
    tree = drafted(target, definition, params, text)
    twin = SlowTwin(target, definition, params, text)
    shapes = set()
    for b, rows in enumerate(ROWS):
        nodes = twin.draft(int(rows))
        assert tree.tokens_T[b].tolist() == [text[0][rows], *(token for _, token, _ in nodes)]
        assert tree.parent_T[b].tolist() == [-1, *(parent for parent, _, _ in nodes)]
        assert tree.depth_T[b].tolist() == [0, *(depth for _, _, depth in nodes)]
        shapes.add(tuple(tree.parent_T[b].tolist()))
        check_tables(jax.tree.map(lambda x, b=b: x[b], tree), definition)
    assert len(shapes) == (1 if name == "chain" else len(ROWS))  # each its own tree
    assert tree.depth_T.max() > 2 and set(tree.tokens_T[:, 1:].flat) <= set(WORDS)


def check_tables(tree, definition):
    """Closed under ancestors, parents first, every table consistent with the parents."""
    assert tree.tokens_T.shape == (definition.nodes,) and tree.valid_T.all()
    for i in range(1, definition.nodes):
        parent = tree.parent_T[i]
        assert 0 <= parent < i
        assert tree.depth_T[i] == tree.depth_T[parent] + 1 <= definition.depth
    for i, children in enumerate(tree.child_TxC):
        expected = np.flatnonzero(tree.parent_T == i).tolist()
        assert children.tolist() == expected + [-1] * (len(children) - len(expected))
        assert len({int(tree.tokens_T[c]) for c in expected}) == len(expected)


# ---- parameters ----------------------------------------------------------------------------------


def test_the_head_starts_from_the_target_s_rows_of_the_draft_vocabulary(target, params):
    np.testing.assert_array_equal(params["buffers"]["vocab_ids"], WORDS)
    np.testing.assert_array_equal(params["head"], np.asarray(head_VxD(target.params))[WORDS])


def test_one_layer_serves_every_step(target, params):
    shapes = jax.tree.map(jnp.shape, params)
    more = Eagle3(target.config, steps=STEPS + 3, draft_vocab_size=len(WORDS))
    init = jax.eval_shape(more.init, jax.random.key(0), target.params)
    assert jax.tree.map(jnp.shape, init) == shapes


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(steps=0), "steps"),
        (dict(top_k=0), "top_k"),
        (dict(draft_depth=-1), "draft_depth"),
        (dict(steps=3, top_k=2, total_nodes=3), "total_nodes"),
        (dict(steps=3, top_k=2, total_nodes=12), "total_nodes"),
        (dict(draft_vocab_size=13), "draft_vocab_size"),
    ],
)
def test_bad_fields_are_named(target, fields, match):
    with pytest.raises(ValueError, match=match):
        Eagle3(target.config, **fields)
    Eagle3(target.config, steps=3, top_k=2, total_nodes=11)  # the whole pool: 2 + 4 + 4
