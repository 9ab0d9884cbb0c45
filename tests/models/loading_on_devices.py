"""What test_loading.py runs in processes of their own: several devices, and memory to themselves.

python loading_on_devices.py memory|mesh|process FOLDER [PROCESS COORDINATOR]
"""

import functools
import gc
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from families import FAMILIES, weights, write_folder
from safetensors.numpy import load_file

from benchmarks.checkpoints import write_checkpoint
from benchmarks.memory import PeakMemory
from specjax.models import hf
from specjax.models.checkpoint import Checkpoint
from specjax.models.config import ModelConfig, read_config
from specjax.models.transformer import stack_layers
from specjax.sharding import leaf_sharding, make_mesh, shardings

WIDE = ModelConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=2048, num_layers=24, num_heads=8,
    num_kv_heads=4, head_dim=64,
)  # fmt: skip


def on(mesh):
    return mesh and functools.partial(leaf_sharding, mesh)


def naive(folder):
    """Everything read, then everything placed."""
    tensors = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return jax.block_until_ready(jax.tree.map(lambda w: jax.device_put(w.copy()), tensors))


def memory(folder):
    """Prints bytes held and the peak of the host's memory, both in this process, by form."""
    write_checkpoint(folder, WIDE, "bfloat16", shards=3, sparse=True)
    load = functools.partial(hf.load_params, folder, WIDE)
    mesh = on(make_mesh((1, 2, 2)))
    forms = {
        "one device, a list, float32": lambda: load(jnp.float32),
        "one device, stacked, bfloat16": lambda: load(jnp.bfloat16, scan_layers=True),
        "mesh, a list, bfloat16": lambda: load(jnp.bfloat16, mesh),
        "mesh, stacked, float32": lambda: load(jnp.float32, mesh, True),
        "naive": lambda: naive(folder),
    }
    for name, form in forms.items():
        with PeakMemory() as peak:
            params = form()
        leaves = jax.tree.leaves(params)
        held = sum(shard.data.nbytes for w in leaves for shard in w.addressable_shards)
        print(json.dumps({"form": name, "held": held, "peak": peak.growth}))
        del params, leaves
        gc.collect()


def recording(seen):
    """Lets `Checkpoint.read` note (tensor, bytes, shape) of what it reads."""
    read = Checkpoint.read

    def noting(self, name, *args, **kwargs):
        array = read(self, name, *args, **kwargs)
        seen.append((name, array.nbytes, array.shape))
        return array

    Checkpoint.read = noting


def checking_programs():
    """Lets every fusing program be compiled once more, to look for data that moves."""
    fused = hf._fused

    def checked(*key):
        program = fused(*key)

        def run(*parts):
            text = program.lower(*parts).compile().as_text()
            for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
                assert collective not in text, f"{key[0].__name__}: {collective}"
            return program(*parts)

        return run

    hf._fused = checked


def mesh(folder):
    """Every leaf of every form: right values, right place, each slice read once."""
    assert len(jax.devices()) == 8
    checking_programs()
    seen = []
    recording(seen)
    for family in ("llama-bias", "qwen3-untied"):
        raw = FAMILIES[family]
        tensors = weights(raw)
        path = write_folder(pathlib.Path(folder) / family, raw, tensors, shards=3)
        config = read_config(path)
        whole = hf.load_params(path, config)
        for shape in ((2, 2, 2), (8, 1, 1), (1, 4, 2)):
            for scan in (False, True):
                grid = make_mesh(shape)
                seen.clear()
                params = hf.load_params(path, config, None, on(grid), scan)
                expected = stack_layers(whole) if scan else whole
                jax.tree.map(np.testing.assert_array_equal, params, expected)
                in_place = lambda w, place: w.sharding.is_equivalent_to(place, w.ndim)  # noqa: E731
                assert all(
                    jax.tree.leaves(jax.tree.map(in_place, params, shardings(grid, expected)))
                )
                assert sum(n for _, n, _ in seen) == sum(w.nbytes for w in tensors.values())
                ways = shape[1] * shape[2]
                for name in ("q_proj", "k_proj", "v_proj"):
                    name = f"model.layers.0.self_attn.{name}.weight"
                    slices = [size for tensor, _, size in seen if tensor == name]
                    assert len(slices) == ways, (name, slices)
                    assert {math.prod(s) * ways for s in slices} == {tensors[name].size}


def process(folder, index, coordinator):
    """One of two hosts with four devices each: it reads what its own devices hold."""
    jax.distributed.initialize(coordinator, num_processes=2, process_id=int(index))
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
    raw = FAMILIES["llama-bias"]
    tensors = weights(raw)
    path = write_folder(pathlib.Path(folder) / index, raw, tensors, shards=3)
    config = read_config(path)
    seen = []
    recording(seen)
    params = hf.load_params(path, config, None, on(make_mesh((1, 4, 2))), scan_layers=True)
    read = {}
    for name, size, _ in seen:
        read[name] = read.get(name, 0) + size
    for name, tensor in tensors.items():
        hosts = 1 if tensor.ndim == 1 else 2  # vectors are replicated, matrices split over both
        assert read[name] * hosts == tensor.nbytes, name
    whole = stack_layers(jax.tree.map(np.asarray, hf.load_params(path, config)))
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])


if __name__ == "__main__":
    {"memory": memory, "mesh": mesh, "process": process}[sys.argv[1]](*sys.argv[2:])
