"""Kangaroo drafts what the first layers, the adapter and the head say, in NumPy and float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import PROMPTS, run_recording, toy_target

import specjax
from configs.common import loss
from specjax.drafters import DRAFTERS, Context
from specjax.generation import make_engine, start
from specjax.models.config import ModelConfig
from specjax.models.transformer import stack_layers
from specjax.sampling import Sampling
from specjax.training.objective import drafter_loss, make_objective

LAYERS, EXIT, DEPTH, THRESHOLD = 4, 2, 4, 0.25


def scaled(layer, factor):
    """A layer that adds `factor` times as much to the residual stream."""
    name = lambda keys: keys[-1].key  # noqa: E731
    return jax.tree_util.tree_map_with_path(
        lambda keys, w: factor * w if name(keys) in ("o", "down") else w, layer
    )


@pytest.fixture(scope="module")
def target():
    """What the first layers say is nearly, but not quite, what the model says."""
    toy = toy_target(num_layers=LAYERS)
    layers = toy.params["layers"]
    whisper = [scaled(layer, 0.25) for layer in layers[EXIT:]]
    return dataclasses.replace(toy, params=toy.params | {"layers": layers[:EXIT] + whisper})


@pytest.fixture(scope="module")
def drafter(target):
    fresh = specjax.init_drafter(
        "kangaroo", target, exit_layer=EXIT, draft_depth=DEPTH, threshold=THRESHOLD
    )
    rng = np.random.default_rng(0)
    norm = {"scale": jnp.asarray(rng.uniform(0.7, 1.3, 16), jnp.float32)}
    adapter = scaled(fresh.params["layers"][0], 0.3)
    return dataclasses.replace(fresh, params={"layers": [adapter], "norm": norm})


# ---- the slow twin -------------------------------------------------------------------------------


def normed(x, scale, config):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * scale


def rotated(x_TxK, config):
    half = x_TxK.shape[1] // 2
    angle = np.arange(len(x_TxK))[:, None] * config.rope_theta ** (-np.arange(half) / half)
    a, b = x_TxK[:, :half], x_TxK[:, half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)


def attended(x_TxD, weights, config):
    """Causal attention, head by head."""
    qkv, out = np.einsum("td,dgrk->tgrk", x_TxD, weights["qkv"]), []
    for group in np.moveaxis(qkv, 1, 0):
        *queries, k, v = np.moveaxis(group, 1, 0)
        for q in queries:
            scores = rotated(q, config) @ rotated(k, config).T / np.sqrt(config.head_dim)
            scores[np.triu_indices(len(scores), 1)] = -np.inf
            share = np.exp(scores - scores.max(1, keepdims=True))
            out.append(share / share.sum(1, keepdims=True) @ v)
    return np.concatenate(out, axis=1) @ weights["o"]


def twin_logits(target, drafter, text):
    """The drafter's logits after every token of a text: TxV."""
    config, float64 = target.config, lambda w: np.asarray(w, np.float64)
    weights, own = jax.tree.map(float64, (target.params, drafter.params))
    x = weights["embed"][np.array(text)]
    for layer in weights["layers"][: drafter.definition.exit_layer]:
        x = x + attended(normed(x, layer["attn_norm"]["scale"], config), layer["attn"], config)
        y = normed(x, layer["mlp_norm"]["scale"], config)
        gate, up = np.moveaxis(np.einsum("td,dcf->tcf", y, layer["mlp"]["gate_up"]), 1, 0)
        x = x + gate / (1 + np.exp(-gate)) * up @ layer["mlp"]["down"]
    (adapter,) = own["layers"]
    x = x + attended(normed(x, adapter["attn_norm"]["scale"], config), adapter["attn"], config)
    head = weights["head"] if "head" in weights else weights["embed"]
    return normed(x, own["norm"]["scale"], config) @ head.T


def twin_draft(target, drafter, text):
    """Greedy tokens, the last of them the first one less probable than the threshold."""
    drafted = []
    while len(drafted) < drafter.definition.draft_depth:
        logits = twin_logits(target, drafter, text + drafted)[-1]
        drafted.append(int(logits.argmax()))
        if 1 / np.exp(logits - logits.max()).sum() < drafter.definition.threshold:
            break
    return drafted


def test_every_draft_is_the_twin_s(target, drafter):
    """Over rounds of every acceptance and draft length, ragged requests beside each other."""
    engine, params = make_engine(target, drafter, stop_tokens=())
    _, record = run_recording(engine, params, start(engine, params, PROMPTS, 30))
    redraft, accepted, drafted = jax.jit(engine.drafter.draft), set(), set()
    for before, after in zip(record, record[1:], strict=False):
        accepted |= set((after.lengths_B - before.lengths_B).tolist())
        context = Context(jnp.asarray(before.tokens_BxS), jnp.asarray(before.lengths_B))
        tree, _ = redraft(drafter.params, target.params, before.drafter, context, None)
        rows = zip(
            before.tokens_BxS, before.lengths_B, tree.tokens_T.tolist(), tree.valid_T.tolist(),
            strict=True,
        )  # fmt: skip
        for text, n, tokens, valid in rows:
            expected = twin_draft(target, drafter, text[:n].tolist())
            assert tokens[: len(expected) + 1] == [text[n - 1], *expected]
            assert valid == [i <= len(expected) for i in range(DEPTH + 1)]
            drafted.add(len(expected))
    assert accepted >= {1, 2, DEPTH + 1} and drafted == set(range(1, DEPTH + 1)), drafted


def test_teaching_is_drafting(target, drafter):
    """Row t reads out what the twin says after x_{t+1}; stacked layers say the same."""
    tokens = np.random.default_rng(0).integers(12, size=(2, 9)).astype(np.int32)
    expected = np.stack([twin_logits(target, drafter, row) for row in tokens.tolist()])

    @jax.jit
    def taught(params, target_params):
        (hidden,), _ = drafter.definition.teach(params, target_params, None, tokens)
        return drafter.definition.logits(params, target_params, hidden)

    for target_params in (target.params, stack_layers(target.params)):
        found = taught(drafter.params, target_params)
        np.testing.assert_allclose(found[:, :-1], expected[:, 1:], atol=1e-4)


# ---- limits --------------------------------------------------------------------------------------


def whole(drafter, target, **fields):
    """Leaves after the last layer, through an adapter that adds nothing: the target itself."""
    definition = drafter.definition.with_budget(exit_layer=LAYERS, **fields)
    adapter = scaled(drafter.params["layers"][0], 0.0)
    params = {"layers": [adapter], "norm": target.params["final_norm"]}
    return dataclasses.replace(drafter, definition=definition, params=params)


def test_the_whole_target_and_no_adapter_is_always_right(target, drafter):
    everything = whole(drafter, target, threshold=0.0)
    out = specjax.generate(target, PROMPTS, everything, 1 + 2 * (DEPTH + 1), stop_tokens=())
    assert out.accept_lengths == [[1] + 2 * [DEPTH + 1]] * len(PROMPTS)


def test_the_whole_target_and_no_adapter_is_a_draft_model_of_the_target_s_weights(target, drafter):
    """Sampled, with the laws on record and the same confidence stop."""
    fields = dict(draft_depth=DEPTH, stop="confidence", threshold=0.15)
    model = specjax.init_drafter("draft_model", target, num_layers=LAYERS, **fields)
    model = dataclasses.replace(model, params=target.params)
    trees = []
    for one in (model, whole(drafter, target, **fields)):
        engine, params = make_engine(target, one, Sampling(0.9, 5), (), "token")
        state = start(engine, params, PROMPTS, 20)
        context = Context(state.tokens_BxS, state.lengths_B)
        tree, _ = jax.jit(engine.drafter.draft)(
            params["drafter"], target.params, state.drafter, context, state.keys_B
        )
        trees.append(jax.device_get(tree))
    ours, theirs = trees
    np.testing.assert_array_equal(ours.valid_T, theirs.valid_T)
    assert 0 < ours.valid_T[:, 1:].mean() < 1
    valid = ours.valid_T
    np.testing.assert_array_equal(ours.tokens_T[valid], theirs.tokens_T[valid])
    laws = (np.exp(tree.law_TxV[:, :-1][valid[:, 1:]]) for tree in trees)
    np.testing.assert_allclose(*laws, atol=1e-5)


@pytest.mark.parametrize("threshold, length", [(0.0, DEPTH), (1.1, 1)])
def test_thresholds_out_of_reach(target, drafter, threshold, length):
    """All are drafted, or the one token that needs no confidence."""
    engine, params = make_engine(target, drafter.with_budget(threshold=threshold), stop_tokens=())
    state = start(engine, params, PROMPTS, 20)
    context = Context(state.tokens_BxS, state.lengths_B)
    draft = jax.jit(engine.drafter.draft)
    tree, _ = draft(params["drafter"], target.params, state.drafter, context, None)
    assert (tree.valid_T.sum(axis=1) == length + 1).all()


# ---- what is read and what is trained ------------------------------------------------------------


def test_only_the_adapter_and_its_norm_are_trained(target, drafter):
    rng = np.random.default_rng(1)
    tokens = rng.integers(12, size=(2, 12)).astype(np.int32)
    batch = {"tokens": tokens, "supervised": np.ones((2, 12), bool)}
    objective = make_objective(loss(), 10)

    @jax.jit
    def gradients(params, target_params):
        def value(params, target_params):
            frozen = {"target": target_params, "buffers": {}}
            return drafter_loss(drafter.definition, objective, params, frozen, batch)[0]

        return jax.grad(value, argnums=(0, 1))(params, target_params)

    own, its = gradients(drafter.params, target.params)
    assert all(jnp.abs(g).max() > 1e-5 for g in jax.tree.leaves(own))
    used = [g for g in jax.tree.leaves(its["layers"] + [its["embed"]]) if jnp.any(g != 0)]
    assert not used


def test_nothing_past_the_exit_is_read(target, drafter):
    tokens = np.random.default_rng(2).integers(12, size=(1, 8)).astype(np.int32)
    teach = jax.jit(drafter.definition.teach)
    other = [jax.tree.map(lambda w: w + 1, layer) for layer in target.params["layers"][EXIT:]]
    layers = target.params["layers"][:EXIT] + other
    changed = target.params | {"layers": layers, "final_norm": {"scale": jnp.zeros(16)}}
    a, b = (teach(drafter.params, p, None, tokens)[0][0] for p in (target.params, changed))
    np.testing.assert_array_equal(a, b)
    layers = [other[0], *target.params["layers"][1:]]
    c = teach(drafter.params, target.params | {"layers": layers}, None, tokens)[0][0]
    assert np.abs(c - a).max() > 0.01


def test_size_is_the_paper_s():
    """67M parameters beside Vicuna-7B: four square matrices and two norms."""
    vicuna = ModelConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_layers=32, num_heads=32,
        num_kv_heads=32, head_dim=128,
    )  # fmt: skip
    definition = DRAFTERS["kangaroo"](vicuna)
    norm = {"final_norm": {"scale": jnp.zeros(4096)}}
    shapes = jax.eval_shape(lambda: definition.init(jax.random.key(0), norm))
    assert sum(w.size for w in jax.tree.leaves(shapes)) == 4 * 4096**2 + 2 * 4096
    assert (definition.nodes, definition.depth, definition.unrolled) == (7, 6, 1)


@pytest.mark.parametrize(
    "fields",
    [
        dict(exit_layer=0), dict(exit_layer=LAYERS + 1), dict(stop="specdec"),
        dict(draft_depth=0), dict(min_depth=7), dict(draft_vocab_size=5), dict(catch_up=1),
    ],
)  # fmt: skip
def test_bad_fields_are_named(target, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        specjax.init_drafter("kangaroo", target, **fields)
