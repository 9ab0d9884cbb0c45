"""On eight simulated devices, under several meshes: the numbers of one device."""

import contextlib
import dataclasses
import functools
import re

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
        vocab_size=64, intermediate_size=48, num_layers=3, num_heads=8, num_kv_heads=4
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
    cfg.optimizer.eps = 1e-4  # the update is then as smooth as the gradient: see test_training
    return cfg


def rows():
    tokens = np.random.default_rng(0).integers(0, 64, (8, 25)).astype(np.int32)
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
    """Losses and weights are those of one device.

    Adam divides by the gradient's own size: where that is next to nothing, the last bit of a sum,
    which depends on the order of its terms, decides the step. An epsilon above that noise leaves
    the comparison to what a mesh can get wrong, and the bound can be tight.
    """
    one = sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
    mesh = sharding.make_mesh(shape)
    losses, params = trained(whole(), one, name, optimizer, **fields)
    # The target's layout and the drafter's are independent.
    for rules in (None, sharding.REPLICATED)[: 2 if name == "fasteagle" else 1]:
        found, weights = trained(spread(shape), mesh, name, optimizer, rules, **fields)
        np.testing.assert_allclose(found, losses, rtol=2e-5)
        for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_a_device_holds_the_states_of_its_own_rows_only(shape):
    """fsdp splits work as well as weights: no product sees a whole batch, nor all rows of data."""
    mesh, target = sharding.make_mesh(shape), spread(shape)
    drafter = specjax.init_drafter("fasteagle", whole(), seed=1, num_layers=2)
    step, state, frozen = set_up(target, drafter, training_config("adamw"), mesh)
    batch = sharding.place(rows(), sharding.batch_sharding(mesh))
    text = step.lower(state, frozen, batch).compile().as_text()
    own = 8 // (shape[0] * shape[1])
    found = {int(n) for n in re.findall(r"f32\[(\d+),25,32\]", text)}
    assert max(found) == own
    # A matrix product flattens rows and positions.
    flat = {int(n) for n in re.findall(r"f32\[(\d+),\d+\]\S* dot\(", text)}
    assert own * 25 in flat and not flat & {n * 25 for n in (2, 4, 8) if n > own}


CASES = [
    pytest.param(name, next(iter(VARIANTS.get(name, {"": {}}).values())), rules, id=f"{name}-{how}")
    for name in DRAFTERS
    for how, rules in (("split", None), ("replicated", sharding.REPLICATED))
    if how == "split" or name in ("fasteagle", "draft_model")
]


@pytest.mark.parametrize("name, fields, rules", CASES)
def test_decoding(name, fields, rules):
    """Greedy output is plain decoding's, split or not; a round keeps its layout, compiled once."""
    target = spread((2, 2, 2))
    drafter = specjax.init_drafter(name, target, seed=1, **fields).on(target.mesh, rules)
    engine, params = make_engine(target, drafter, stop_tokens=())
    assert engine.layout.drafter_sharded == (rules is None and drafter.definition.trained)
    state = start(engine, params, PROMPTS, 12)
    before = jax.tree.map(lambda x: x.sharding, state)
    assert before.cache.k[0].spec[:2] == (("data", "fsdp"), "tensor")
    state = decoding.jit_round(engine, params, state)
    assert jax.tree.map(lambda x: x.sharding, state) == before
    with no_compilation():
        state = decoding.run_host(engine, params, decoding.jit_round(engine, params, state))
    assert specjax.generation.collect(state)[0] == plain()


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("eagle3", dict(steps=2, draft_vocab_size=16), np.arange(1, 64, 4)),
        ("draft_model", dict(num_layers=1, stop="specdec"), None),
    ],
    ids=str,
)
def test_drafters_are_made_and_loaded_where_they_lie(name, fields, words, tmp_path, monkeypatch):
    """By the rules from the start: no device holds them whole, and the values are one device's."""
    target = spread((2, 2, 2))
    one = specjax.init_drafter(name, whole(), 1, words, **fields)
    one.save(tmp_path)
    placed = []
    monkeypatch.setattr("specjax.trained.place", lambda tree, layout: placed.append(tree) or tree)
    made = specjax.init_drafter(name, target, 1, words, **fields).params
    specjax.load_drafter(tmp_path, target)
    read = placed.pop()
    assert all(isinstance(w, np.ndarray) for w in jax.tree.leaves(read))  # never on one device
    monkeypatch.undo()
    loaded = specjax.load_drafter(tmp_path, target).params
    rules = (*one.definition.partition, *sharding.MODEL_RULES)
    layout = sharding.shardings(target.mesh, one.params, rules)
    for params in (made, loaded):
        fits = jax.tree.map(lambda w, s: w.sharding.is_equivalent_to(s, w.ndim), params, layout)
        assert jax.tree.all(fits), fits
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # noqa: E731
        jax.tree.map(close, sharding.fetch(params), sharding.fetch(one.params))


@functools.cache
def plain():
    return specjax.generate(whole(), PROMPTS, max_new_tokens=12, stop_tokens=()).tokens


def test_few_prompts_on_many_devices():
    """A batch that the devices do not divide is decoded whole on each."""
    out = specjax.generate(spread((2, 2, 2)), PROMPTS[:1], max_new_tokens=12, stop_tokens=())
    assert out.tokens == plain()[:1]


@contextlib.contextmanager
def no_compilation():
    """Fails if XLA compiles a round within."""
    compiled = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [name for name in compiled if "round" in name], compiled
