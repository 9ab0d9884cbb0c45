"""The drafter loss against a slow loop over rows, depths and the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from specjax.generation import init_drafter
from specjax.models import transformer
from specjax.training.objective import drafter_loss

DRAFTERS = {
    "fasteagle": ("fasteagle", dict(num_layers=3)),
    "fasteagle sliced": ("fasteagle", dict(num_layers=2, entry="wide_qkv", draft_vocab_size=40)),
    "eagle3": ("eagle3", dict(steps=3, draft_vocab_size=40)),
}


def config(**changes):
    return ConfigDict(dict(ce=1.0, feature=0.0, decay=0.8, chunk=0) | changes)


def setup(target, name):
    family, fields = DRAFTERS[name]
    size = fields.get("draft_vocab_size", 0)
    ids = np.random.default_rng(0).permutation(61)[:size] if size else None
    drafter = init_drafter(family, target, vocab_ids=ids, **fields)
    params = {k: v for k, v in drafter.params.items() if k != "buffers"}
    frozen = {"target": target.params, "buffers": drafter.params.get("buffers", {})}
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 61, (2, 12)).astype(np.int32)
    supervised = rng.random((2, 12)) < 0.7
    return drafter, params, frozen, {"tokens": tokens, "supervised": supervised}


@pytest.mark.parametrize("name", DRAFTERS)
def test_loss_equals_a_loop_over_rows_and_depths(target, name):
    drafter, params, frozen, batch = setup(target, name)
    definition, tokens = drafter.definition, batch["tokens"]
    loss, metrics = drafter_loss(definition, config(feature=0.3), params, frozen, batch)

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


def test_chunking_and_remat_change_neither_loss_nor_gradient(target):
    drafter, params, frozen, batch = setup(target, "fasteagle")

    @jax.jit
    def whole(p):
        return drafter_loss(drafter.definition, config(), p, frozen, batch)[0]

    @jax.jit
    def chunked(p):
        return drafter_loss(drafter.definition, config(chunk=4), p, frozen, batch)[0]

    a, b = jax.value_and_grad(whole)(params), jax.value_and_grad(chunked)(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_no_gradient_reaches_the_target(target):
    drafter, params, frozen, batch = setup(target, "eagle3")

    def loss(target_params):
        inputs = frozen | {"target": target_params}
        return drafter_loss(drafter.definition, config(feature=1.0), params, inputs, batch)[0]

    grads = jax.jit(jax.grad(loss))(target.params)
    # The readout head of a frozen-head drafter is stopped too; EAGLE-3's own head is not here.
    used = [g for g in jax.tree.leaves(grads) if jnp.any(g != 0)]
    assert not used
