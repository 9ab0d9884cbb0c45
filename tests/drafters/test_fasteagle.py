"""FastEagle: the cascade that decodes row by row is the cascade that was trained all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_target, whole_prompt

import specjax
from specjax.cache import empty_cache
from specjax.drafters import FastEagle
from specjax.drafters.base import Committed, Context

N, C, T = 3, 4, 14  # cascade layers, candidates, rows of the teacher-forced pass
WORDS = np.array([0, 2, 3, 5, 6, 8, 9, 11])  # draft vocabulary
VARIANTS = {
    "fc2h": dict(entry="fc2h"),
    "wide_qkv": dict(entry="wide_qkv"),
    "fspad": dict(entry="sampled", partial_alignment=True),
}


class Case:
    """One variant with its teacher-forced pass over one text.

    `hidden` and `logits` are depth x variant x row x ...: variant 0 is the text itself, variant
    1 + t the text with another token in row t.
    """

    def __init__(self, name):
        self.target = toy_target()
        config = dict(num_layers=N, candidates=C, draft_vocab_size=len(WORDS)) | VARIANTS[name]
        trained = specjax.init_drafter("fasteagle", self.target, seed=2, vocab_ids=WORDS, **config)
        self.definition, self.params = trained.definition, trained.params
        rng = np.random.default_rng(0)
        self.text = rng.integers(12, size=T + 1)
        self.tokens = self.text[1:]  # row t holds x_{t+1}
        width = len(self.definition.taps) * self.target.config.hidden_size
        self.taps = rng.normal(size=(T, width)).astype(np.float32)
        self.variants = np.repeat(self.tokens[None], T + 1, axis=0)
        self.variants[1:] = (self.variants[1:] + np.eye(T, dtype=int)) % 12

        @jax.jit
        def full_pass(params, target_params, taps, tokens):
            taps = jnp.broadcast_to(taps, (T + 1, *taps.shape))
            hidden, _ = self.definition.unroll(params, target_params, taps, tokens)
            logits = [self.definition.logits(params, target_params, h) for h in hidden]
            return jnp.stack(hidden), jnp.stack(logits)

        out = full_pass(self.params, self.target.params, self.taps, self.variants)
        self.hidden, self.logits = jax.device_get(out)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request):
    return Case(request.param)


# ---- one pass or many ----------------------------------------------------------------------------


def split_at_random(rng, total, most):
    """Sizes between 1 and `most` that add up to `total`."""
    sizes = []
    while sum(sizes) < total:
        sizes.append(int(rng.integers(1, min(most, total - sum(sizes)) + 1)))
    return sizes


def test_extending_in_any_pieces_equals_the_full_pass(case):
    """Each request of the batch gets the text in its own pieces; rows past a piece are junk."""
    rng = np.random.default_rng(1)
    splits = [[1] * T, [4, 4, 4, 2], *(split_at_random(rng, T, 4) for _ in range(4))]
    B, A, slots = len(splits), 4, T + 4

    @jax.jit
    def extend(params, target_params, cache, rows):
        hidden, cache = case.definition.extend(params, target_params, cache, rows)
        return jnp.stack(hidden), cache

    cache = empty_cache(case.definition.block, B, slots, layers=N)
    done = np.zeros(B, int)
    for step in range(T):
        sizes = np.array([s[step] if step < len(s) else 0 for s in splits])
        tokens = rng.integers(12, size=(B, A))
        taps = rng.normal(size=(B, A, case.taps.shape[-1])).astype(np.float32)
        for b, n in enumerate(sizes):
            tokens[b, :n] = case.tokens[done[b] : done[b] + n]
            taps[b, :n] = case.taps[done[b] : done[b] + n]
        rows = Committed(tokens, taps, sizes)
        hidden, cache = extend(case.params, case.target.params, cache, rows)
        hidden = np.asarray(hidden)
        for b, n in enumerate(sizes):
            whole = case.hidden[:, 0, done[b] : done[b] + n]
            np.testing.assert_allclose(hidden[:, b, :n], whole, atol=2e-5)
        done += sizes
    assert (done == T).all() and (np.asarray(cache.lengths_B) == T).all()
    for layer in map(np.asarray, (*cache.k, *cache.v)):  # however it was cut, the same cache
        np.testing.assert_allclose(layer[:, :, :T], layer[:1, :, :T].repeat(B, axis=0), atol=2e-5)


# ---- what a row may look at ----------------------------------------------------------------------


def test_row_t_reads_the_next_token_and_none_after_it(case):
    """Changing the token of row t, which is x_{t+1}, moves rows t.. at every depth, no other."""
    base, changed = case.hidden[:, :1], case.hidden[:, 1:]
    moved = np.abs(changed - base).max(axis=(0, 3))  # token changed x row
    later = np.triu(np.ones((T, T), bool))
    assert (moved[later] > 1e-6).all()
    assert (moved[~later] == 0).all()
    by_depth = np.abs(changed - base).max(axis=3)[:, np.arange(T), np.arange(T)]
    assert (by_depth > 1e-6).all()  # its own row, at every depth


@pytest.fixture(scope="module")
def gradients(case):
    """Jacobian of one scalar per depth, read at one row, by (weights, target, taps)."""
    row = 6
    weights = {k: v for k, v in case.params.items() if k != "buffers"}

    @jax.jit
    def jacobian(weights, target_params, taps):
        def scalars(weights, target_params, taps):
            params = weights | {"buffers": case.params["buffers"]}
            hidden, _ = case.definition.unroll(params, target_params, taps[None], case.variants[:1])
            logits = [case.definition.logits(params, target_params, h) for h in hidden]
            return jnp.stack([-jax.nn.log_softmax(x[0, row])[2] for x in logits])

        return jax.jacrev(scalars, argnums=(0, 1, 2))(weights, target_params, taps)

    return row, *jax.device_get(jacobian(weights, case.target.params, case.taps))


def size(tree):
    """Largest absolute derivative, per depth."""
    leaves = [np.abs(x).reshape(len(x), -1).max(axis=1) for x in jax.tree.leaves(tree)]
    return np.max(leaves, axis=0)


def test_the_loss_of_depth_i_trains_layers_up_to_i(gradients):
    _, weights, _, _ = gradients
    for j, layer in enumerate(weights["layers"]):
        reached = size(layer)
        assert (reached[:j] == 0).all() and (reached[j:] > 1e-6).all()
    for name in set(weights) - {"layers"}:  # entry, fusion and norms serve all depths
        assert (size(weights[name]) > 1e-7).all(), name


def test_the_target_is_frozen(gradients):
    _, _, target, _ = gradients
    assert (size(target) == 0).all()


def test_features_are_read_up_to_their_own_row(gradients):
    row, _, _, taps = gradients  # depth x row x features
    assert (np.abs(taps[:, : row + 1]).max(axis=2) > 0).all()
    assert (taps[:, row + 1 :] == 0).all()


# ---- drafting ------------------------------------------------------------------------------------

ROWS = np.array([T, 5, 1, 9])  # committed rows of each request


def drafted(case, definition, params):
    """The tree that each request of ROWS drafts after prefilling its rows."""

    @jax.jit
    def run(params, target_params):
        B = len(ROWS)
        repeat = lambda x: jnp.repeat(jnp.asarray(x)[None], B, axis=0)  # noqa: E731
        state = definition.init_state(B, T + 8, jnp.float32)
        rows = Committed(repeat(case.tokens), repeat(case.taps), jnp.asarray(ROWS))
        state = definition.prefill(params, target_params, state, rows, whole_prompt(rows))
        context = Context(repeat(case.text), jnp.asarray(ROWS + 1))
        return definition.draft(params, target_params, state, context, None)[0]

    return jax.device_get(run(params, case.target.params))


def best_words(case, row, depth, count):
    """Target ids of the likeliest draft words, best first, from the teacher-forced pass."""
    return WORDS[np.argsort(-case.logits[depth - 1, 0, row])[:count]]


def test_the_draft_is_the_readout_of_the_last_row_in_backbone_order(case):
    tree = drafted(case, case.definition, case.params)
    node = lambda i, j: i if j == 1 else N + (i - 1) * (C - 1) + (j - 1)  # noqa: E731
    assert tree.tokens_T.shape == (len(ROWS), N * C + 1)
    for b, rows in enumerate(ROWS):
        assert tree.tokens_T[b, 0] == case.text[rows]
        assert tree.parent_T[b, 0] == -1 and tree.depth_T[b, 0] == 0
        for i in range(1, N + 1):
            words = best_words(case, rows - 1, i, C)
            for j in range(1, C + 1):
                at = node(i, j)
                assert tree.tokens_T[b, at] == words[j - 1]
                assert tree.parent_T[b, at] == (0 if i == 1 else node(i - 1, 1))
                assert tree.depth_T[b, at] == i
    assert tree.valid_T.all()


def test_a_smaller_budget_uses_the_first_layers_alone(case):
    if case.definition.entry == "wide_qkv":
        pytest.skip("the entry is not what this is about")
    small = case.definition.with_budget(draft_depth=2, candidates=2)
    assert (small.depth, small.nodes, small.scratch) == (2, 5, 3)
    layers = list(case.params["layers"])
    layers[2] = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), layers[2])
    tree = drafted(case, small, case.params | {"layers": layers})
    for b, rows in enumerate(ROWS):
        first, second = (best_words(case, rows - 1, i, 2) for i in (1, 2))
        expected = [case.text[rows], first[0], second[0], first[1], second[1]]
        assert tree.tokens_T[b].tolist() == expected


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels, candidates", [(1, 1), (3, 1), (1, 5), (6, 10)])
def test_tree_sizes(levels, candidates):
    definition = FastEagle(toy_target().config, num_layers=levels, candidates=candidates)
    tree = definition.topology
    assert definition.nodes == tree.nodes == levels * candidates + 1
    assert definition.depth == tree.max_depth == levels
    leaves = set(range(tree.nodes)) - set(tree.parents)
    assert len(leaves) == (levels - 1) * (candidates - 1) + candidates
    assert tree.only_last_moves


def test_layers_have_parameters_of_their_own(case):
    D = case.target.config.hidden_size
    assert len(case.params["layers"]) == N
    assert case.params["fc"].shape == (3 * D, D)
    leaves = [x for layer in case.params["layers"] for x in jax.tree.leaves(layer)]
    assert len({id(x) for x in leaves}) == len(leaves)
    wide = case.params["layers"][0]["attn"]["qkv"].shape[0] == 2 * D
    assert wide == (case.definition.entry == "wide_qkv")
    assert ("entry" in case.params) != wide
    assert all(layer["attn"]["qkv"].shape[0] == D for layer in case.params["layers"][1:])


def test_layers_may_be_thinner_than_the_target_s():
    target = toy_target()
    thin = dict(num_layers=2, intermediate_size=8, num_heads=1, num_kv_heads=1)
    definition = FastEagle(target.config, **thin)
    shapes = jax.eval_shape(definition.init, jax.random.key(0), target.params)
    assert shapes["layers"][1]["mlp"]["gate_up"].shape == (16, 2, 8)
    assert shapes["layers"][1]["attn"]["qkv"].shape == (16, 1, 3, 8)


@pytest.mark.parametrize(
    "field, value",
    [
        ("entry", "wide"),
        ("num_layers", 0),
        ("candidates", 0),
        ("draft_depth", 8),
        ("draft_depth", -1),
        ("draft_vocab_size", 13),
        ("feature_layers", (0, 4)),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        FastEagle(toy_target().config, **{field: value})
