"""Loading straight into device memory: the right slices, each read once, and no second copy."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from families import FAMILIES, weights, write_folder

from specjax import sharding
from specjax.models import target as target_module
from specjax.models.checkpoint import Checkpoint
from specjax.models.config import read_config
from specjax.models.hf import Loader, load_params, split_layer, tensor_shapes
from specjax.models.transformer import stack_layers

HERE = pathlib.Path(__file__).parent
SLACK = 45 * 2**20
"""Bytes past the model: compiled programs and a few tensors, not a fourth of the model."""


def start(what, folder, *arguments, devices=8, **environment) -> subprocess.Popen:
    """One of the checks of loading_on_devices.py in a process of its own."""
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
    }
    return subprocess.Popen(
        [sys.executable, str(HERE / "loading_on_devices.py"), what, str(folder), *arguments],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process) -> str:
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def test_a_mesh_gets_the_slices_it_asks_for_and_each_is_read_once(tmp_path):
    finish(start("mesh", tmp_path))


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").is_file(), reason="needs /proc")
def test_the_host_never_holds_a_second_copy(tmp_path):
    """On CPU the devices' memory is the host's, so the peak is the model and what lies beside it.

    A fixed mmap threshold makes malloc hand freed arrays back, so that memory in use is what shows.
    """
    process = start("memory", tmp_path, devices=4, MALLOC_MMAP_THRESHOLD_="65536")
    rows = {row["form"]: row for row in map(json.loads, finish(process).splitlines())}
    control = rows.pop("naive")
    assert control["peak"] > 1.9 * control["held"], "the measure sees a second copy"
    assert len(rows) == 4
    for form, row in rows.items():
        assert row["held"] > 4 * SLACK, form
        assert 0.9 * row["held"] < row["peak"] < row["held"] + SLACK, (form, row)


@pytest.mark.slow
def test_every_process_reads_its_own_devices_slices(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    hosts = [start("process", tmp_path, str(i), coordinator, devices=4) for i in range(2)]
    for host in hosts:
        finish(host)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_as_it_is_read_equals_stacked_afterwards(family, tmp_path):
    raw = FAMILIES[family]
    config = read_config(write_folder(tmp_path, raw, weights(raw), shards=2))
    stacked = load_params(tmp_path, config, scan_layers=True)
    jax.tree.map(
        np.testing.assert_array_equal, stacked, stack_layers(load_params(tmp_path, config))
    )


def test_the_checkpoint_s_tensors_are_known_beforehand(tmp_path):
    for family, raw in FAMILIES.items():
        tensors = weights(raw)
        config = read_config(write_folder(tmp_path / family, raw, tensors))
        assert tensor_shapes(config) == {name: w.shape for name, w in tensors.items()}, family


def test_a_layer_wider_at_its_entry(tmp_path):
    """What a drafter's first layer reads may be wider than what it writes."""
    raw = FAMILIES["llama3"]
    tensors, D = weights(raw), raw["hidden_size"]
    for name in ("q", "k", "v"):
        w = tensors[f"model.layers.0.self_attn.{name}_proj.weight"]
        tensors[f"model.layers.0.self_attn.{name}_proj.weight"] = np.concatenate([w, -w], axis=1)
    config = read_config(write_folder(tmp_path, raw, tensors))
    layer = Loader(Checkpoint(tmp_path), config).layer("model.layers.0.", "layers/0", in_dim=2 * D)
    assert layer["attn"]["qkv"].shape[0] == 2 * D
    for name, w in split_layer(layer, config, "model.layers.0.").items():
        np.testing.assert_array_equal(w, tensors[name])


def test_a_slice_reads_no_more_than_itself(tmp_path):
    raw = FAMILIES["llama3"]
    tensors = weights(raw)
    write_folder(tmp_path, raw, tensors, shards=2)
    checkpoint, name = Checkpoint(tmp_path), "model.layers.0.mlp.up_proj.weight"
    whole = tensors[name]
    for index in ((slice(3, 7), slice(0, 32)), (slice(0, 48), slice(8, 16)), (slice(5, 5),) * 2):
        np.testing.assert_array_equal(checkpoint.read(name, whole.shape, index=index), whole[index])


def test_a_mesh_that_does_not_fit_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    """`sharding.check_mesh` decides; here it is asked, and asked first."""

    def refuse(mesh, config):
        raise ValueError(f"mesh: {config.num_kv_heads} key/value heads")

    monkeypatch.setattr(sharding, "check_mesh", refuse, raising=False)
    monkeypatch.setattr(target_module, "load_params", functools.partial(pytest.fail, "read"))
    with pytest.raises(ValueError, match="mesh: .* key/value heads"):
        target_module.load_target("builtin", mesh=sharding.make_mesh((1, 1, -1)))
