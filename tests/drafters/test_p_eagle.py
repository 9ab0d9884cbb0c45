"""P-EAGLE: the pass over mask rows that is trained is the one that drafts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_target, whole_prompt

import specjax
from specjax.drafters import PEagle
from specjax.drafters.base import Committed, Context

N, C, LAYERS, T = 4, 3, 3, 13  # rows of a draft, candidates, layers, rows of the text
WORDS = np.array([0, 2, 3, 5, 6, 8, 9, 11])  # draft vocabulary


class Case:
    """A drafter, a text and its teacher-forced pass.

    `hidden` is depth x variant x row x D: variant 0 is the text itself, variant 1 + t the text with
    another token in row t.
    """

    def __init__(self):
        self.target = toy_target()
        config = dict(num_layers=LAYERS, draft_depth=N, candidates=C, draft_vocab_size=len(WORDS))
        trained = specjax.init_drafter("p_eagle", self.target, 2, vocab_ids=WORDS, **config)
        self.definition, self.params = trained.definition, trained.params
        rng = np.random.default_rng(0)
        self.text = rng.integers(12, size=T + 1)
        self.tokens = self.text[1:]  # row t holds x_{t+1}
        width = len(self.definition.taps) * self.target.config.hidden_size
        self.taps = rng.normal(size=(T, width)).astype(np.float32)
        variants = np.repeat(self.tokens[None], T + 1, axis=0)
        variants[1:] = (variants[1:] + np.eye(T, dtype=int)) % 12

        @jax.jit
        def full_pass(params, target_params, taps, tokens):
            taps = jnp.broadcast_to(taps, (T + 1, *taps.shape))
            return jnp.stack(self.definition.unroll(params, target_params, taps, tokens)[0])

        out = full_pass(self.params, self.target.params, self.taps, variants)
        self.hidden = jax.device_get(out)
        logits = self.definition.logits(self.params, self.target.params, out[:, 0])
        self.logits = jax.device_get(logits)  # depth x row x word


@pytest.fixture(scope="module")
def case():
    return Case()


# ---- training is drafting ------------------------------------------------------------------------


def test_unrolling_equals_one_plain_causal_pass_a_position(case):
    """Sequence t: true rows 0..t, then N - 1 mask rows, no cache and no diagonal keys."""
    definition, R = case.definition, T + N - 1
    true = np.arange(R) <= np.arange(T)[:, None]  # sequence x row

    @jax.jit
    def run(params, target_params):
        pad = lambda x: jnp.pad(jnp.asarray(x), ((0, R - T),) + ((0, 0),) * (x.ndim - 1))[None]  # noqa: E731
        taps = jnp.where(true[..., None], pad(case.taps), params["mask_hidden"])
        e = target_params["embed"][pad(case.tokens)]
        e = jnp.where(true[..., None], e, params["mask_token"])
        positions = jnp.broadcast_to(jnp.arange(R), (T, R))
        mask = jnp.tril(jnp.ones((1, R, R), bool))
        return definition._layers(params, definition.fuse(params, taps), e, positions, mask)[0]

    x = np.asarray(run(case.params, case.target.params))
    for t in range(T):
        np.testing.assert_allclose(case.hidden[:, 0, t], x[t, t : t + N], atol=2e-5)


def test_unrolling_equals_drafting_round_by_round(case):
    """Requests commit 0 to N + 1 rows a round; pending rows past those are junk."""
    rng = np.random.default_rng(1)
    seen = []

    class Watched(PEagle):
        def draw_tree(self, params, target_params, hidden_BxNxD, root_B, keys_B):
            seen.append(hidden_BxNxD)
            return None

    fields = {f.name: getattr(case.definition, f.name) for f in dataclasses.fields(PEagle)}
    definition = Watched(**fields)
    B, A = 6, N + 1
    prompts = np.array([1, 5, 3, 1, 2, 4])

    @jax.jit
    def start(params, target_params):
        state = definition.init_state(B, T + 2 * N, jnp.float32)
        repeat = lambda x: jnp.repeat(jnp.asarray(x)[None], B, axis=0)  # noqa: E731
        rows = Committed(repeat(case.tokens), repeat(case.taps), jnp.asarray(prompts))
        return definition.prefill(params, target_params, state, rows, whole_prompt(rows))

    @jax.jit
    def draft(params, target_params, state):
        context = Context(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32))
        _, state = definition.draft(params, target_params, state, context, None)
        return seen.pop(), state

    state, done = start(case.params, case.target.params), prompts.copy()
    sizes_seen = set()
    while True:
        hidden, state = draft(case.params, case.target.params, state)
        np.testing.assert_array_equal(state.cache.lengths_B, done)
        for b, row in enumerate(done - 1):
            if state.pending.counts_B[b]:  # else the request is done, and its draft is not read
                np.testing.assert_allclose(hidden[b], case.hidden[:, 0, row], atol=3e-5)
        if (done == T).all():
            break
        sizes = np.minimum(rng.integers(1, A + 1, size=B), T - done)
        tokens = rng.integers(12, size=(B, A))
        taps = 100 * rng.normal(size=(B, A, case.taps.shape[-1])).astype(np.float32)
        for b, n in enumerate(sizes):
            tokens[b, :n] = case.tokens[done[b] : done[b] + n]
            taps[b, :n] = case.taps[done[b] : done[b] + n]
        rows = Committed(jnp.asarray(tokens), jnp.asarray(taps), jnp.asarray(sizes))
        state = definition.absorb(case.params, state, rows, None, None)
        done, sizes_seen = done + sizes, sizes_seen | set(sizes.tolist())
    assert sizes_seen >= {0, 1, A}


# ---- what a row may look at ----------------------------------------------------------------------


def test_row_t_reads_tokens_up_to_x_t_plus_1_at_every_depth(case):
    moved = np.abs(case.hidden[:, 1:] - case.hidden[:, :1]).max(axis=3)  # depth x changed x row
    later = np.triu(np.ones((T, T), bool))
    assert (moved[:, later] > 1e-7).all()
    assert (moved[:, ~later] == 0).all()


@pytest.fixture(scope="module")
def gradients(case):
    """Jacobian of one scalar a depth, read at one row, by (weights, target, taps)."""
    row = 6
    weights = {k: v for k, v in case.params.items() if k != "buffers"}

    @jax.jit
    def jacobian(weights, target_params, taps):
        def scalars(weights, target_params, taps):
            params = weights | {"buffers": case.params["buffers"]}
            tokens = case.tokens[None]
            hidden, _ = case.definition.unroll(params, target_params, taps[None], tokens)
            logits = [case.definition.logits(params, target_params, h) for h in hidden]
            return jnp.stack([-jax.nn.log_softmax(x[0, row])[2] for x in logits])

        return jax.jacrev(scalars, argnums=(0, 1, 2))(weights, target_params, taps)

    return row, *jax.device_get(jacobian(weights, case.target.params, case.taps))


def size(tree):
    """Largest absolute derivative, per depth."""
    leaves = [np.abs(x).reshape(len(x), -1).max(axis=1) for x in jax.tree.leaves(tree)]
    return np.max(leaves, axis=0)


def test_mask_rows_train_from_the_second_depth_on_all_else_from_the_first(gradients):
    _, weights, target, _ = gradients
    for name in ("mask_token", "mask_hidden"):
        reached = size(weights[name])
        assert reached[0] == 0 and (reached[1:] > 1e-6).all()
    assert len(weights["layers"]) == LAYERS
    for layer in weights["layers"]:
        assert (size(layer) > 1e-6).all()
    for name in ("fc", "fc_norm", "norm"):
        assert (size(weights[name]) > 1e-7).all()
    assert (size(target) == 0).all()


def test_features_are_read_up_to_their_own_row(gradients):
    row, _, _, taps = gradients  # depth x row x features
    assert (np.abs(taps[:, : row + 1]).max(axis=2) > 0).all()
    assert (taps[:, row + 1 :] == 0).all()


# ---- drafting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{}, dict(draft_depth=2, candidates=2), dict(draft_depth=6)])
def test_the_draft_is_the_teacher_forced_readout_in_backbone_order(case, budget):
    """Fewer rows draft what the first of more do: no row sees a later one."""
    definition = case.definition.with_budget(**budget)
    depth, C = definition.draft_depth, definition.candidates
    rows = np.array([T, 5, 1, 9])

    @jax.jit
    def run(params, target_params):
        B = len(rows)
        repeat = lambda x: jnp.repeat(jnp.asarray(x)[None], B, axis=0)  # noqa: E731
        state = definition.init_state(B, T + 2 * depth, jnp.float32)
        committed = Committed(repeat(case.tokens), repeat(case.taps), jnp.asarray(rows))
        state = definition.prefill(params, target_params, state, committed, whole_prompt(committed))
        context = Context(repeat(case.text), jnp.asarray(rows + 1))
        return definition.draft(params, target_params, state, context, None)[0]

    tree = jax.device_get(run(case.params, case.target.params))
    assert tree.tokens_T.shape == (len(rows), depth * C + 1)
    node = lambda i, j: i if j == 1 else depth + (i - 1) * (C - 1) + (j - 1)  # noqa: E731
    for b, n in enumerate(rows):
        assert tree.tokens_T[b, 0] == case.text[n]
        for i in range(1, min(depth, N) + 1):
            words = WORDS[np.argsort(-case.logits[i - 1, n - 1])]
            for j in range(1, C + 1):
                assert tree.tokens_T[b, node(i, j)] == words[j - 1]
                assert tree.parent_T[b, node(i, j)] == (0 if i == 1 else node(i - 1, 1))


# ---- parameters ----------------------------------------------------------------------------------


def test_parameters_fit_any_depth(case):
    D, shapes = 16, jax.tree.map(jnp.shape, case.params)
    assert shapes["mask_token"] == (D,) and shapes["mask_hidden"] == (3 * D,)
    wide, *rest = [layer["attn"]["qkv"][0] for layer in shapes["layers"]]
    assert wide == 2 * D and rest == [D] * (LAYERS - 1)
    deeper = case.definition.with_budget(draft_depth=N + 3)
    init = jax.eval_shape(deeper.init, jax.random.key(0), case.target.params)
    assert jax.tree.map(jnp.shape, init) == shapes
    assert deeper.unrolled == N + 3 and deeper.scratch == 2 * (N + 3)


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_layers", 0),
        ("draft_depth", 0),
        ("candidates", 0),
        ("draft_vocab_size", 13),
        ("feature_layers", (0, 4)),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        PEagle(toy_target().config, **{field: value})
