"""DFlash: a plain loop over anchors, the trained pass and the cached rounds draft the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_target, whole_prompt

import specjax
from specjax.drafters import DFlash
from specjax.drafters.base import Committed, Context
from specjax.drafters.proposals import Proposal
from specjax.sampling import Sampling

N, C, T = 3, 3, 13  # mask tokens of a block, candidates, rows of the teacher-forced pass
WORDS = np.array([0, 2, 3, 5, 6, 8, 9, 11])  # draft vocabulary
FIELDS = dict(num_layers=2, block_size=N + 1, candidates=C, anchors=5)
TARGETS = {
    "llama": dict(),
    "qwen": dict(qk_norm=True, qkv_bias=True, o_bias=True, num_heads=4, num_kv_heads=2, head_dim=6),
}


class Case:
    """One geometry with its teacher-forced pass over one text.

    Row t of `tokens` holds x_{t+1}. `hidden` is depth x variant x row x D: variant 0 is the text
    itself, 1 + t has another token in row t, 1 + T + t other features there. `logits` are the
    text's, depth x row x word.
    """

    def __init__(self, name):
        self.target = toy_target(**TARGETS[name])
        trained = specjax.init_drafter(
            "dflash", self.target, seed=2, vocab_ids=WORDS, draft_vocab_size=len(WORDS), **FIELDS
        )
        self.definition, rng = trained.definition, np.random.default_rng(0)
        noisy = lambda w: w + 0.2 * rng.normal(size=w.shape).astype(np.float32)  # noqa: E731
        weights = {k: v for k, v in trained.params.items() if k != "buffers"}
        self.params = jax.tree.map(noisy, weights) | {"buffers": trained.params["buffers"]}
        self.text = rng.integers(12, size=T + 1)
        self.tokens = self.text[1:]
        width = len(self.definition.taps) * self.target.config.hidden_size
        self.taps = rng.normal(size=(T, width)).astype(np.float32)
        tokens = np.repeat(self.tokens[None], 1 + 2 * T, axis=0)
        taps = np.repeat(self.taps[None], 1 + 2 * T, axis=0)
        tokens[1 : 1 + T] = (tokens[1 : 1 + T] + np.eye(T, dtype=int)) % 12
        taps[1 + T :] += np.eye(T, dtype=np.float32)[..., None]
        self.hidden = unrolled(self, self.definition, taps, tokens)
        self.logits = jax.device_get(
            jax.jit(self.definition.logits)(self.params, self.target.params, self.hidden[:, 0])
        )


def unrolled(case, definition, taps, tokens):
    run = jax.jit(lambda p, q, *rows: jnp.stack(definition.unroll(p, q, *rows)[0]))
    return jax.device_get(run(case.params, case.target.params, taps, tokens))


made = functools.cache(Case)


@pytest.fixture(params=TARGETS)
def case(request):
    return made(request.param)


@pytest.fixture
def qwen():
    return made("qwen")


# ---- the slow twin -------------------------------------------------------------------------------


class SlowTwin:
    """One block after another in float64, one row, head and key at a time; no cache, no mask."""

    def __init__(self, case, mask_tokens=N):
        as64 = lambda w: np.asarray(w, np.float64)  # noqa: E731
        self.p = jax.tree.map(as64, case.params)
        self.embed = as64(case.target.params["embed"])
        self.c, self.taps, self.masks = case.definition.block, as64(case.taps), mask_tokens

    def norm(self, x, scale):
        return x / np.sqrt(np.mean(x * x) + self.c.rms_norm_eps) * scale["scale"]

    def turn(self, x_K, position):
        half = len(x_K) // 2
        angle = position * self.c.rope_theta ** (-np.arange(half) / half)
        a, b = x_K[:half], x_K[half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
        )

    def key_value(self, attn, x, group, position):
        """The layer's key and value of one head group for a row already normed."""
        R = self.c.num_heads // self.c.num_kv_heads
        key, value = (x @ attn["qkv"][:, group, r] for r in (R, R + 1))
        if self.c.qkv_bias:
            key, value = key + attn["qkv_bias"][group, R], value + attn["qkv_bias"][group, R + 1]
        if self.c.qk_norm:
            key = self.norm(key, attn["k_norm"])
        return self.turn(key, position), value

    def attention(self, attn, rows, context, first):
        G, heads = self.c.num_kv_heads, []
        R = self.c.num_heads // G
        for group in range(G):
            seen = [(g, p) for p, g in enumerate(context)]
            seen += [(x, first + j) for j, x in enumerate(rows)]
            keys, values = zip(*(self.key_value(attn, x, group, p) for x, p in seen), strict=True)
            for r in range(R):
                out = []
                for j, x in enumerate(rows):
                    query = x @ attn["qkv"][:, group, r]
                    if self.c.qkv_bias:
                        query = query + attn["qkv_bias"][group, r]
                    if self.c.qk_norm:
                        query = self.norm(query, attn["q_norm"])
                    query = self.turn(query, first + j)
                    weight = np.exp([query @ key / np.sqrt(self.c.head_dim) for key in keys])
                    out.append(weight / weight.sum() @ np.array(values))
                heads.append(out)
        y = [np.concatenate(parts) @ attn["o"] for parts in zip(*heads, strict=True)]
        return [row + attn["o_bias"] for row in y] if self.c.o_bias else y

    def mlp(self, weights, x):
        gate, up = (x @ weights["gate_up"][:, i] for i in (0, 1))
        return (gate / (1 + np.exp(-gate)) * up) @ weights["down"]

    def block(self, row, token):
        """Hidden states of the mask tokens after the root x_{row+1} = token."""
        context = []
        for taps in self.taps[: row + 1]:
            split = np.split(taps, len(self.p["fc_norm"]))
            split = [self.norm(x, s) for x, s in zip(split, self.p["fc_norm"], strict=True)]
            g = np.concatenate(split) @ self.p["fc"]
            context.append(self.norm(g, self.p["context_norm"]))
        x = [self.embed[token]] + [self.p["mask"]] * self.masks
        for layer in self.p["layers"]:
            normed = [self.norm(row, layer["attn_norm"]) for row in x]
            y = self.attention(layer["attn"], normed, context, row + 1)
            x = [a + b for a, b in zip(x, y, strict=True)]
            x = [a + self.mlp(layer["mlp"], self.norm(a, layer["mlp_norm"])) for a in x]
        return x[1:]


def test_every_block_is_what_a_loop_over_anchors_makes_of_it(case):
    twin = SlowTwin(case)
    for row in range(T):
        expected = twin.block(row, case.tokens[row])
        np.testing.assert_allclose(case.hidden[:, 0, row], expected, atol=5e-5)


@pytest.mark.parametrize("anchors", [1, 64])
def test_blocks_are_the_same_however_many_run_at_once(qwen, anchors):
    definition = qwen.definition.with_budget(anchors=anchors)
    hidden = unrolled(qwen, definition, qwen.taps[None], qwen.tokens[None])
    np.testing.assert_allclose(hidden, qwen.hidden[:, :1], atol=1e-5)


def test_more_mask_tokens_move_every_depth(qwen):
    """The block is read in both directions: row 1 sees the rows after it."""
    longer = qwen.definition.with_budget(block_size=N + 2)
    hidden = unrolled(qwen, longer, qwen.taps[None], qwen.tokens[None])
    gap = np.abs(hidden[:N, 0] - qwen.hidden[:, 0]).max(axis=2)
    assert len(hidden) == N + 1 and (gap > 1e-3).all()
    row = T // 2
    expected = SlowTwin(qwen, N + 1).block(row, qwen.tokens[row])
    np.testing.assert_allclose(hidden[:, 0, row], expected, atol=5e-5)


# ---- what a block may look at --------------------------------------------------------------------


def test_a_block_reads_its_root_and_no_other_token(qwen):
    moved = np.abs(qwen.hidden[:, 1 : 1 + T] - qwen.hidden[:, :1]).max(axis=3)
    own = np.eye(T, dtype=bool)
    assert (moved[:, own] > 1e-4).all() and (moved[:, ~own] == 0).all()


def test_a_block_reads_features_up_to_the_token_before_its_root(qwen):
    moved = np.abs(qwen.hidden[:, 1 + T :] - qwen.hidden[:, :1]).max(axis=3)
    known = np.triu(np.ones((T, T), bool))  # row of the features x row of the block
    assert (moved[:, known] > 1e-5).all() and (moved[:, ~known] == 0).all()


def test_rows_after_a_text_change_nothing_in_it(qwen):
    short = T - 4
    hidden = unrolled(qwen, qwen.definition, qwen.taps[None, :short], qwen.tokens[None, :short])
    np.testing.assert_allclose(hidden, qwen.hidden[:, :1, :short], atol=1e-5)


def test_every_weight_learns_and_the_target_does_not(qwen):
    weights = {k: v for k, v in qwen.params.items() if k != "buffers"}

    def loss(weights, target_params, definition):
        params = weights | {"buffers": qwen.params["buffers"]}
        rows = qwen.taps[None], qwen.tokens[None]
        hidden = jnp.stack(definition.unroll(params, target_params, *rows)[0])
        logits = definition.logits(params, target_params, hidden[:, 0])
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 2])

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    own, target = grad(weights, qwen.target.params, qwen.definition)
    assert all(np.abs(g).max() > 1e-7 for g in jax.tree.leaves(own))
    assert not any(np.any(g) for g in jax.tree.leaves(target))
    whole, _ = grad(weights, qwen.target.params, qwen.definition.with_budget(anchors=T))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, own, whole)


# ---- drafting ------------------------------------------------------------------------------------


def rounds_of(rng, most):
    """Sizes between 1 and `most` that add up to T."""
    sizes = []
    while sum(sizes) < T:
        sizes.append(int(rng.integers(1, min(most, T - sum(sizes)) + 1)))
    return sizes


def test_rounds_of_any_length_draft_what_was_taught(case):
    """Each request commits the text in its own pieces, junk behind them; the laws are compared."""
    rng = np.random.default_rng(1)
    proposal = Proposal("with_replacement", Sampling(1.0))
    definition = dataclasses.replace(case.definition, proposal=proposal, candidates=1)
    A = definition.depth + 1
    splits = [[1] * T, [A] * (T // A) + [T % A], *(rounds_of(rng, A) for _ in range(4))]
    B = len(splits)
    keys = jax.random.split(jax.random.key(0), B)
    draft = jax.jit(definition.draft)
    expected = case.definition.to_target_laws(case.params, jax.nn.log_softmax(case.logits))
    expected = np.exp(expected)  # depth x row x V
    # As tight as the engine may make it: the committed tokens and the scratch.
    state = definition.init_state(B, T + 1 + definition.scratch, jnp.float32)
    done, finished = np.zeros(B, int), []
    for step in range(T):
        sizes = np.array([s[step] if step < len(s) else 0 for s in splits], np.int32)
        tokens = rng.integers(12, size=(B, A)).astype(np.int32)
        taps = rng.normal(size=(B, A, case.taps.shape[-1])).astype(np.float32)
        for b, n in enumerate(sizes):
            tokens[b, :n] = case.tokens[done[b] : done[b] + n]
            taps[b, :n] = case.taps[done[b] : done[b] + n]
        done += sizes
        state = definition.absorb(case.params, state, Committed(tokens, taps, sizes), None, None)
        context = Context(np.repeat(case.text[None], B, axis=0), done + 1)
        tree, state = draft(case.params, case.target.params, state, context, keys)
        np.testing.assert_array_equal(state.cache.lengths_B, done)
        np.testing.assert_array_equal(tree.tokens_T[:, 0], case.text[done])
        laws = np.exp(tree.law_TxV)
        for b in range(B):
            np.testing.assert_allclose(laws[b, :N], expected[:, done[b] - 1], atol=2e-5)
        finished.append((done == T).sum())
    assert finished[-1] == B and finished[0] == 0
    for layer in map(np.asarray, (*state.cache.k, *state.cache.v)):  # however it was cut
        np.testing.assert_allclose(layer[:, :, :T], layer[:1, :, :T].repeat(B, axis=0), atol=2e-5)


ROWS = np.array([T, 5, 1, 9])  # committed rows of each request


def drafted(case, definition, keys=None):
    """The tree that each request of ROWS drafts after prefilling its rows."""

    @jax.jit
    def run(params, target_params):
        repeat = lambda x: jnp.repeat(jnp.asarray(x)[None], len(ROWS), axis=0)  # noqa: E731
        state = definition.init_state(len(ROWS), T + 1 + definition.scratch, jnp.float32)
        rows = Committed(repeat(case.tokens), repeat(case.taps), jnp.asarray(ROWS))
        state = definition.prefill(params, target_params, state, rows, whole_prompt(rows))
        context = Context(repeat(case.text), jnp.asarray(ROWS + 1))
        return definition.draft(params, target_params, state, context, keys)[0]

    return jax.device_get(run(case.params, case.target.params))


@pytest.mark.parametrize("levels", [N, 1])
def test_the_draft_is_the_whole_block_s_readout_in_backbone_order(qwen, levels):
    """A smaller budget reads out fewer rows of the same block."""
    definition = qwen.definition.with_budget(draft_depth=levels)
    tree = drafted(qwen, definition)
    assert definition.nodes == levels * C + 1 and definition.unrolled == N
    assert definition.scratch == N + 1
    for b, rows in enumerate(ROWS):
        words = [WORDS[np.argsort(-qwen.logits[i, rows - 1])[:C]] for i in range(levels)]
        backbone = [w[0] for w in words]
        leaves = [token for w in words for token in w[1:]]
        assert tree.tokens_T[b].tolist() == [qwen.text[rows], *backbone, *leaves]
        parents = [*range(-1, levels), *(i for i in range(levels) for _ in range(C - 1))]
        assert tree.parent_T[b].tolist() == parents


# ---- shapes --------------------------------------------------------------------------------------


def test_layers_may_be_thinner_than_the_target_s():
    target = toy_target()
    thin = dict(num_layers=2, intermediate_size=8, num_heads=1, num_kv_heads=1)
    definition = DFlash(target.config, **thin)
    shapes = jax.eval_shape(definition.init, jax.random.key(0), target.params)
    assert len(shapes["layers"]) == 2 and shapes["mask"].shape == (16,)
    assert shapes["layers"][1]["mlp"]["gate_up"].shape == (16, 2, 8)
    assert shapes["layers"][1]["attn"]["qkv"].shape == (16, 1, 3, 8)
    assert (definition.depth, definition.unrolled, definition.nodes) == (15, 15, 16)


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_layers", 0),
        ("block_size", 1),
        ("candidates", 0),
        ("anchors", 0),
        ("draft_depth", 16),
        ("draft_depth", -1),
        ("draft_vocab_size", 13),
        ("feature_layers", (0, 4)),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        DFlash(toy_target().config, **{field: value})
