"""On eight simulated devices, under several meshes: the numbers of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from drafters.test_generic import VARIANTS
from ml_collections import ConfigDict
from toys import PROMPTS, random_target

import specjax
from configs import common
from specjax import decoding, sharding
from specjax.drafters import DRAFTERS
from specjax.generation import make_engine, start
from specjax.models.transformer import stack_layers
from specjax.training.drafter import set_up

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))

pytestmark = pytest.mark.skipif(len(jax.devices()) != 8, reason="needs eight (simulated) devices")


@functools.cache
def whole(scan: bool = False):
    """A target on one device whose every dimension divides by 8, or by 4 for its k/v heads."""
    target = random_target(
        vocab_size=64, intermediate_size=48, num_heads=8, num_kv_heads=4, qk_norm=True
    )
    params = stack_layers(target.params) if scan else target.params
    return dataclasses.replace(target, params=params)


@functools.cache
def spread(shape, scan: bool = False):
    """The same target on a mesh of eight devices."""
    target, mesh = whole(scan), sharding.make_mesh(shape)
    sharding.check_mesh(mesh, target.config)
    params = sharding.place(target.params, sharding.shardings(mesh, target.params))
    return dataclasses.replace(target, params=params, mesh=mesh)


def training_config(name: str) -> ConfigDict:
    cfg = common.base("test", "").train
    cfg.steps, cfg.batch_size = 3, 8
    cfg.optimizer = common.optimizer(learning_rate=1e-2, warmup_steps=1)
    cfg.optimizer.name = name
    return cfg


def rows():
    tokens = np.random.default_rng(0).integers(0, 64, (8, 24)).astype(np.int32)
    supervised = np.ones_like(tokens, bool)
    supervised[:, :5] = False
    return {"tokens": tokens, "supervised": supervised}


def trained(target, mesh, name, optimizer, rules=None, **fields):
    """(losses of three steps, parameters after them), on the host."""
    drafter = specjax.init_drafter(name, whole(), seed=1, **fields)
    step, state, frozen = set_up(target, drafter, training_config(optimizer), mesh, rules=rules)
    losses = []
    for _ in range(3):
        batch = sharding.place(rows(), sharding.batch_sharding(mesh))
        state, values = step(state, frozen, batch)
        losses.append(float(values["loss"]))
    return losses, sharding.fetch(state.params)


@pytest.mark.parametrize("scan", [False, True], ids=["listed", "scanned"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_logits(shape, scan):
    tokens = np.random.default_rng(1).integers(0, 64, (8, 12))
    expected = np.asarray(whole(scan).logits(tokens))
    np.testing.assert_allclose(np.asarray(spread(shape, scan).logits(tokens)), expected, atol=2e-5)


@pytest.mark.parametrize(
    "name, fields, optimizer, shape",
    [
        ("fasteagle", dict(num_layers=2), "muon", (2, 2, 2)),
        ("fasteagle", dict(num_layers=2), "adamw", (1, 2, 4)),
        ("eagle3", dict(steps=2, draft_vocab_size=16), "adamw", (8, 1, 1)),
        ("eagle3", dict(steps=2), "muon", (1, 8, 1)),
        ("medusa", dict(heads=2), "adamw", (2, 2, 2)),
    ],
    ids=str,
)
def test_training(name, fields, optimizer, shape):
    one = sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
    mesh = sharding.make_mesh(shape)
    losses, params = trained(whole(), one, name, optimizer, **fields)
    # The target's layout and the drafter's are independent.
    for rules in (None, sharding.REPLICATED):
        found, weights = trained(spread(shape), mesh, name, optimizer, rules, **fields)
        np.testing.assert_allclose(found, losses, rtol=2e-5)
        for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)


CASES = [(name, label) for name in DRAFTERS for label in VARIANTS.get(name, {"default": {}})]


@pytest.mark.parametrize("name, label", CASES, ids=str)
def test_decoding(name, label):
    """Greedy output is plain decoding's, whole or split; a round keeps its layout."""
    fields = VARIANTS.get(name, {}).get(label, {})
    plain = specjax.generate(whole(), PROMPTS, max_new_tokens=12, stop_tokens=()).tokens
    target = spread((2, 2, 2))
    drafter = specjax.init_drafter(name, target, seed=1, **fields)
    for rules in (None, sharding.REPLICATED):
        placed = drafter.on(target.mesh, rules)
        engine, params = make_engine(target, placed, stop_tokens=())
        assert engine.layout.drafter_sharded == (rules is None and bool(placed.params)) or (
            not placed.definition.trained
        )
        state = start(engine, params, PROMPTS, 12)
        before = jax.tree.map(lambda x: x.sharding, state)
        compiled = decoding.jit_round._cache_size()
        state = decoding.jit_round(engine, params, state)
        assert jax.tree.map(lambda x: x.sharding, state) == before
        state = decoding.run_host(engine, params, state)
        assert decoding.jit_round._cache_size() == compiled + 1
        tokens, _ = specjax.generation.collect(state)
        assert tokens == plain
