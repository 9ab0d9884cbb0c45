"""A target with stacked layers trains and decodes as the same target with a list of them."""

import dataclasses
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from toys import PROMPTS, toy_target

import specjax
from configs.common import loss as plain_loss
from specjax.models.layers import recomputed_layers
from specjax.models.transformer import forward, logits_of, stack_layers
from specjax.training.objective import drafter_loss, make_objective


@pytest.fixture(scope="module")
def targets():
    target = toy_target()
    return target, dataclasses.replace(target, params=stack_layers(target.params))


@pytest.fixture(scope="module")
def drafter(targets):
    return specjax.init_drafter("fasteagle", targets[0], num_layers=2, candidates=2)


def test_decoding(targets, drafter):
    """Tapped features, the cache and the rows that verification moves in it."""
    assert targets[0].fingerprint == targets[1].fingerprint
    settings = dict(max_new_tokens=16, stop_tokens=())
    listed, stacked = (specjax.generate(t, PROMPTS, drafter, **settings) for t in targets)
    assert listed.tokens == stacked.tokens and listed.accept_lengths == stacked.accept_lengths
    assert max(map(max, listed.accept_lengths)) > 1, "nothing was accepted: nothing moved"


def test_training_a_drafter(targets, drafter):
    tokens = np.random.default_rng(0).integers(0, 12, (2, 10)).astype(np.int32)
    batch = {"tokens": tokens, "supervised": np.ones_like(tokens, bool)}
    objective = dataclasses.replace(make_objective(plain_loss(), 10), remat=True)

    def gradient(target):
        frozen = {"target": target.params, "buffers": {}}
        loss = lambda p: drafter_loss(drafter.definition, objective, p, frozen, batch)[0]  # noqa: E731
        return jax.jit(jax.grad(loss))(drafter.params)

    listed, stacked = map(gradient, targets)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), listed, stacked
    )


def test_training_the_target_itself(targets):
    """Gradients through both loops, kept and recomputed, taps included."""
    config, tokens = targets[0].config, np.arange(10, dtype=np.int32)[None]

    def loss(params, remat):
        with recomputed_layers() if remat else nullcontext():
            out = forward(params, config, tokens, taps=(1,))
        value = jax.nn.logsumexp(logits_of(params, out.hidden_BxTxD), axis=-1)
        return value.mean() + (out.taps_BxTxM**2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    listed = stack_layers(gradient(targets[0].params, False))
    for remat in (False, True):
        stacked = gradient(targets[1].params, remat)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), listed, stacked
        )
