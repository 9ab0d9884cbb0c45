"""The drafter loss against a slow loop over rows, depths and the vocabulary."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_target

from configs.common import loss as plain_loss
from specjax.models import transformer
from specjax.trained import init_drafter
from specjax.training.objective import drafter_loss, make_objective

DRAFTERS = {
    "fasteagle": ("fasteagle", dict(num_layers=3)),
    "fasteagle sliced": ("fasteagle", dict(num_layers=2, entry="wide_qkv", draft_vocab_size=40)),
    "eagle3": ("eagle3", dict(steps=3, draft_vocab_size=40)),
}


def objective(**changes):
    cfg = plain_loss()
    for name, value in changes.items():
        cfg[name] = value
    return make_objective(cfg, 10)


def setup(target, name):
    family, fields = DRAFTERS[name]
    size = fields.get("draft_vocab_size", 0)
    ids = np.random.default_rng(0).permutation(61)[:size] if size else None
    drafter = init_drafter(family, target, vocab_ids=ids, **fields)
    return drafter, *inputs_of(drafter, target)


def inputs_of(drafter, target):
    """(parameters, frozen, batch) of random rows."""
    params = {k: v for k, v in drafter.params.items() if k != "buffers"}
    frozen = {"target": target.params, "buffers": drafter.params.get("buffers", {})}
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 61, (2, 12)).astype(np.int32)
    supervised = rng.random((2, 12)) < 0.7
    return params, frozen, {"tokens": tokens, "supervised": supervised}


@pytest.mark.parametrize("name", DRAFTERS)
def test_loss_equals_a_loop_over_rows_and_depths(target, name):
    drafter, params, frozen, batch = setup(target, name)
    definition, tokens = drafter.definition, batch["tokens"]
    loss, metrics = drafter_loss(definition, objective(feature=0.3), params, frozen, batch)

    out = transformer.forward(target.params, target.config, tokens, taps=definition.taps)
    teacher = np.asarray(transformer.logits_of(target.params, out.hidden_BxTxD), np.float64)
    following = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    hidden, _ = definition.unroll(drafter.params, target.params, out.taps_BxTxM, following)
    ids = np.arange(61)
    if definition.draft_vocab_size:
        ids = np.asarray(drafter.params["buffers"]["vocab_ids"])
    expected = 0.0
    for i, h in enumerate(hidden, start=1):
        normed = definition.normed(drafter.params, h)
        student = np.asarray(definition.logits(drafter.params, target.params, h), np.float64)
        ce, feature, rows, agree, seen = 0.0, 0.0, 0, 0, 0
        for b in range(2):
            for t in range(12):
                if t + 1 + i >= 12 or not batch["supervised"][b, t + 1 + i]:
                    continue
                best = teacher[b, t + i].argmax()
                seen += 1
                agree += ids[student[b, t].argmax()] == best
                if best not in ids:
                    continue
                p = np.exp(teacher[b, t + i][ids] - teacher[b, t + i][ids].max())
                q = student[b, t] - np.log(np.exp(student[b, t]).sum())
                ce -= (p / p.sum() * q).sum()
                gap = np.abs(np.asarray(normed[b, t] - out.hidden_BxTxD[b, t + i], np.float64))
                feature += np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
                rows += 1
        expected += 0.8 ** (i - 1) * (ce + 0.3 * feature) / rows
        np.testing.assert_allclose(metrics[f"ce_{i}"], ce / rows, rtol=2e-4)
        np.testing.assert_allclose(metrics[f"agree_{i}"], agree / seen, rtol=1e-6)
    np.testing.assert_allclose(loss, expected, rtol=2e-4)


def test_chunking_changes_neither_loss_nor_gradient(target):
    drafter, params, frozen, batch = setup(target, "fasteagle")

    @jax.jit
    def whole(p):
        return drafter_loss(drafter.definition, objective(), p, frozen, batch)[0]

    @jax.jit
    def chunked(p):
        return drafter_loss(drafter.definition, objective(chunk=4), p, frozen, batch)[0]

    a, b = jax.value_and_grad(whole)(params), jax.value_and_grad(chunked)(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.parametrize("name", ["fasteagle", "eagle3"])
def test_recomputed_layers_give_the_same_gradient(target, name):
    drafter, params, frozen, batch = setup(target, name)

    def gradient(remat):
        fixed = dataclasses.replace(objective(), remat=remat)
        loss = lambda p: drafter_loss(drafter.definition, fixed, p, frozen, batch)[0]  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    kept, recomputed = gradient(False), gradient(True)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, kept, recomputed)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(kept)) > 0.01


def test_recomputed_layers_take_less_memory():
    """Attention weights of four layers at once, or of one."""
    drafter = init_drafter("fasteagle", random_target(), num_layers=4)
    params, frozen, _ = inputs_of(drafter, random_target())
    tokens = np.zeros((1, 128), np.int32)
    batch = {"tokens": tokens, "supervised": np.ones_like(tokens, bool)}

    def temporary(remat):
        fixed = dataclasses.replace(objective(), remat=remat)
        loss = lambda p: drafter_loss(drafter.definition, fixed, p, frozen, batch)[0]  # noqa: E731
        # By default XLA's CPU compiler orders for parallelism and lets memory grow.
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        program = jax.jit(jax.grad(loss)).lower(params).compile(compiler_options=options)
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(True) < 0.6 * temporary(False)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("fasteagle", dict(num_layers=2)),
        ("fasteagle", dict(num_layers=2, partial_alignment=True)),
        ("eagle3", dict(steps=2)),
        ("p_eagle", dict(num_layers=2, draft_depth=2)),
        ("dflash", dict(num_layers=2, block_size=3)),
        ("draft_model", dict(num_layers=2)),
    ],
)
def test_the_layers_of_every_family_can_be_recomputed(target, name, fields):
    drafter = init_drafter(name, target, **fields)
    params, frozen, batch = inputs_of(drafter, target)

    def pieces(remat):
        fixed = dataclasses.replace(objective(), remat=remat)
        loss = lambda p: drafter_loss(drafter.definition, fixed, p, frozen, batch)[0]  # noqa: E731
        return str(jax.make_jaxpr(loss)(params)).count("prevent_cse")

    assert pieces(True) >= pieces(False) + 2


def test_no_gradient_reaches_the_target(target):
    drafter, params, frozen, batch = setup(target, "eagle3")

    def loss(target_params):
        inputs = frozen | {"target": target_params}
        return drafter_loss(drafter.definition, objective(feature=1.0), params, inputs, batch)[0]

    grads = jax.jit(jax.grad(loss))(target.params)
    # The readout head of a frozen-head drafter is stopped too; EAGLE-3's own head is not here.
    used = [g for g in jax.tree.leaves(grads) if jnp.any(g != 0)]
    assert not used


# ---- gates, divergences and streams in place -----------------------------------------------------

SMALL = dict(num_layers=2, feature_layers=(0,))
REDUCTIONS = {
    "forward_kl": (dict(divergence="forward_kl"), 40),
    "skewed_kl": (dict(divergence="skewed_kl", divergence_options=dict(alpha=0.0)), 40),
    "speckd": (dict(gate="speckd", gate_options=dict(beta=1.0)), 40),
    "adaspec": (dict(gate="adaspec", gate_options=dict(fraction=1.0)), 40),
    "recorded": (dict(gate="recorded"), 40),
    # Positions whose label is outside the draft vocabulary have no streams: the whole one here.
    "deepkd": (dict(deepkd=True, deepkd_options=dict(ce_weight=0.0)), 0),
}


@pytest.fixture(scope="module")
def small():
    return random_target(num_layers=1, hidden_size=16, num_heads=1, num_kv_heads=1)


def gradients(target, changes, batch_changes=(), size=40):
    """(gradient of the summed losses, metrics) under an objective."""
    ids = np.random.default_rng(0).permutation(61)[:size] if size else None
    drafter = init_drafter("fasteagle", target, vocab_ids=ids, draft_vocab_size=size, **SMALL)
    params, frozen, batch = inputs_of(drafter, target)
    batch = batch | dict(batch_changes)
    frozen = frozen | {"reference": jax.tree.map(lambda w: 0.9 * w, params)}

    @jax.jit
    def run(params):
        def loss(p):
            value, metrics = drafter_loss(
                drafter.definition, objective(**changes), p, frozen, batch, 3, jax.random.key(0)
            )
            return jnp.sum(value), metrics

        return jax.grad(loss, has_aux=True)(params)

    return run(params)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, b)


@pytest.fixture(scope="module")
def plain(small):
    return {size: gradients(small, {}, size=size)[0] for size in (0, 40)}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_every_objective_reduces_to_the_plain_one(small, plain, name):
    changes, size = REDUCTIONS[name]
    everything = {"recorded": np.ones((2, 12, 2), bool)}
    assert_close(gradients(small, changes, everything, size)[0], plain[size])


def test_a_gate_ranks_all_rows_whatever_the_chunks(small, plain):
    gate = dict(gate="adaspec", gate_options=dict(fraction=0.3, normalise=False))
    whole, metrics = gradients(small, gate)
    assert_close(whole, gradients(small, gate | dict(chunk=3))[0])
    assert 0.2 < metrics["kept_1"] < 0.5 and 0.2 < metrics["kept_2"] < 0.5
    pairs = zip(*map(jax.tree.leaves, (whole, plain[40])), strict=True)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in pairs)


def test_a_gate_that_keeps_nothing_leaves_zero(small):
    nothing = {"recorded": np.zeros((2, 12, 2), bool)}
    grads, metrics = gradients(small, dict(gate="recorded"), nothing)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))
    assert np.isfinite(metrics["ce_1"]) and metrics["kept_1"] == 0


def test_hard_labels_are_deepkd_s_first_stream(small):
    """Both are next-token training on the text's own covered tokens."""
    options = dict(mode="dkd", ce_weight=1.0, alpha=0.0, beta=0.0)
    hard, _ = gradients(small, dict(ce=0.0, hard=1.0))
    assert_close(hard, gradients(small, dict(deepkd=True, deepkd_options=options))[0])
    assert max(np.abs(g).max() for g in jax.tree.leaves(hard)) > 1e-3
