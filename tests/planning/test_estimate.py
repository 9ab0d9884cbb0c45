"""Whole estimates: what they hold fixed, advise and refuse, and how near to XLA they come."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import pytest

from configs import compare, fasteagle
from experiments.estimate import contenders, geometry, plan
from specjax.planning.accelerators import ACCELERATORS, get_accelerator
from specjax.planning.advice import advise, changed
from specjax.planning.tables import seconds, size

H100 = get_accelerator("h100")


@pytest.fixture(scope="module")
def smoke():
    config = fasteagle.get_config("smoke")
    del config.drafters.eagle3
    config.target.scan_layers = True  # quicker to trace
    config.train.batch_size = jax.device_count()  # a mesh is made of all devices there are
    return config, plan(config, H100)


def test_published_presets_are_known():
    for hub_id, _, _ in fasteagle.PUBLISHED.values():
        assert geometry(hub_id).vocab_size > 0


def test_parameters_are_the_drafters_own(smoke):
    _, found = smoke
    assert [m.name for m in found.methods] == ["vanilla", "fasteagle"]
    drafter = found.methods[1]
    assert drafter.training.weights == 4 * drafter.parameters == drafter.initial
    assert drafter.training.gradients == drafter.training.weights
    layer = 2 * 128 + 128 * 4 * 64 + 128 * 128 + 3 * 128 * 384
    assert found.target_parameters == 2048 * 128 + 24 * layer + 128
    assert found.target == 4 * found.target_parameters


def test_more_of_anything_takes_more(smoke):
    config, found = smoke
    for field, stage in (
        ("train.batch_size", "train fasteagle"),
        ("data.length", "train fasteagle"),
        ("data.batch", "regenerate"),
        ("eval.batch", "decode fasteagle"),
    ):
        part, name = field.split(".")
        more = plan(changed(config, {field: 2 * config[part][name]}), H100)
        assert more.stages[stage] > found.stages[stage], field


def test_advice_was_tried(smoke):
    config, found = smoke
    small = dataclasses.replace(H100, memory=0.8 * found.peak)
    run = lambda other: plan(other, small)  # noqa: E731
    tight = run(config)
    assert not tight.fits
    changes, after, steps = advise(config, tight, run)
    assert after.fits and run(changed(config, changes)).peak == after.peak
    assert sum(saved for _, saved in steps) == tight.peak - after.peak


def test_every_drafter_is_planned():
    config = compare.get_config("smoke")
    names = [c.name for c in contenders(config, geometry("builtin"))]
    assert names == list(config.drafters)


def test_refusals():
    with pytest.raises(ValueError, match="accelerator: 'tpu9' is unknown; one of .*v5e"):
        get_accelerator("tpu9")
    with pytest.raises(ValueError, match="target.name: 'nobody/nothing' is no folder"):
        geometry("nobody/nothing")
    config = fasteagle.get_config("smoke")
    config.mesh = (1, 3, 5)
    with pytest.raises(ValueError, match="mesh: "):
        plan(config, H100)


def test_figures_of_chips_are_per_second():
    for chip in ACCELERATORS.values():
        assert 1e10 < chip.memory < 3e11 and 5e11 < chip.bandwidth < 1e13, chip.name
        assert chip.bfloat16 > chip.float32 > 1e13 and chip.links < chip.bandwidth, chip.name


def test_text():
    assert [size(n) for n in (12, 2_300, 141e9, 8.05e12)] == ["12 B", "2.3 kB", "141 GB", "8.05 TB"]
    assert (seconds(0.0125), seconds(3.0)) == ("12.5 ms", "3 s")


# ---- against XLA ---------------------------------------------------------------------------------

GEOMETRY = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=8,
    num_kv_heads=4, head_dim=32,
)  # fmt: skip
PROGRAM = """
import sys, jax
mesh, scan, batch, chunk = eval(sys.argv[1])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", {devices})
from configs import fasteagle
from specjax.drafters import DRAFTERS
from specjax.models.config import ModelConfig
from specjax.planning import shards
from specjax.sharding import drafter_rules
from specjax.planning.compiled import lower_step, total
from specjax.planning.programs import Model, state_shapes, training_step
from specjax.training.optimizers import make_optimizer
from specjax.sharding import make_mesh
config = fasteagle.get_config("smoke")
model = Model(ModelConfig(**{geometry}), "float32", scan, make_mesh(mesh))
drafter = DRAFTERS["fasteagle"].of(model.config, dict(num_layers=2))
cfg = config.train
cfg.optimizer.name, cfg.batch_size, cfg.loss.chunk = "adamw", batch, chunk
rules = drafter_rules(drafter.partition)
first, second, gradients = training_step(model, drafter, cfg, 128, rules)
whole, _ = shards.drafter_shapes(drafter, model.params)
state = state_shapes(whole, make_optimizer(cfg.optimizer, cfg.steps))
held = shards.device_bytes(model.mesh, state, rules)
held += shards.device_bytes(model.mesh, model.params)
print("RATIO", (held + max(first.peak, gradients + second.peak))
      / total(lower_step(model, drafter, cfg, 128, rules)))
"""


def ratio(devices: int, *case) -> float:
    code = PROGRAM.format(devices=devices, geometry=GEOMETRY)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, repr(case)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return float(re.search(r"RATIO (\S+)", done.stdout)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices, case",
    [
        (1, ((-1, 1, 1), False, 2, 0)),
        (1, ((-1, 1, 1), True, 4, 32)),
        (8, ((2, 1, 4), False, 8, 32)),
        (8, ((2, 2, 2), True, 8, 0)),
    ],
)
def test_training_steps_take_what_xla_says(devices, case):
    assert ratio(devices, *case) == pytest.approx(1.0, abs=0.15)
