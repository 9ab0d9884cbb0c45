"""python -m benchmarks.load: seconds and host memory of loading a checkpoint into device memory.

Writes a checkpoint of the geometry (made-up weights, several shards) and loads it in turns with
specjax and in the naive way, reading whole files and fusing on the host before anything is placed.
Every sample is a process of its own that has started and compiled nothing else. Files are in the
page cache after the first, so that both are timed without the disk.

    python -m benchmarks.load --target=random:1024x4096x16x32000:16:4:64 --dtype=bfloat16
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from safetensors.numpy import load_file

from benchmarks.checkpoints import write_checkpoint
from benchmarks.memory import PeakMemory
from benchmarks.targets import random_config
from benchmarks.timing import cores
from experiments import commands
from specjax.console import make_console, print_rows
from specjax.models.config import read_config
from specjax.models.hf import (
    EMBED,
    FINAL_NORM,
    LAYER_WEIGHTS,
    layer_paths,
    layer_prefix,
    load_params,
)

_TARGET = flags.DEFINE_string(
    "target", "random:1024x4096x16x32000:16:4:64", "random:HIDDENxFFNxLAYERSxVOCAB[:H:G:K]"
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the parameters")
_SHARDS = flags.DEFINE_integer("shards", 4, "files", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "samples of each way", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "file for the numbers")
_SAMPLE = flags.DEFINE_string("sample", None, "FOLDER to load once as --form says, for the parent")
_FORM = flags.DEFINE_string("form", None, "with --sample: which way to load")


def naive(folder, config, dtype):
    """All tensors, then all parameters, then the devices."""
    tensors = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)

    def fused(path, prefix):
        names, fuse, *_ = LAYER_WEIGHTS[path]
        with jax.default_device(jax.devices("cpu")[0]):
            return np.asarray(fuse(config, *(tensors[prefix + name] for name in names)))

    params = {"embed": tensors[EMBED], "final_norm": tensors[FINAL_NORM]}
    for i in range(config.num_layers):
        for path in layer_paths(config):
            params[layer_prefix(i) + "/".join(path)] = fused(path, layer_prefix(i))
    return jax.tree.map(lambda w: jnp.array(w, dtype), params)


FORMS = {
    "specjax": load_params,
    "specjax, scan_layers": lambda *args: load_params(*args, scan_layers=True),
    "naive": naive,
}


def sample(folder, form: str, dtype: str):
    """Loads once and prints what it took."""
    config = read_config(folder)
    jnp.zeros(1).block_until_ready()
    with PeakMemory() as memory:
        started = time.perf_counter()
        params = jax.block_until_ready(FORMS[form](folder, config, jnp.dtype(dtype)))
        seconds = time.perf_counter() - started
    held = sum(w.nbytes for w in jax.tree.leaves(params))
    row = {"form": form, "seconds": seconds, "held": held, "peak": memory.growth}
    print(json.dumps(row | {"device": jax.devices()[0].device_kind}))


def run(folder, form: str) -> dict:
    """One sample in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.load", f"--sample={folder}", f"--form={form}",
               f"--dtype={_DTYPE.value}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"loading as {form!r} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    if _SAMPLE.value:
        return sample(_SAMPLE.value, _FORM.value, _DTYPE.value)
    config = commands.tried("target", random_config, _TARGET.value)
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(folder, config, shards=_SHARDS.value)
        turns = [{form: run(folder, form) for form in FORMS} for _ in range(_REPEATS.value)]
    rows = []
    for form in FORMS:
        samples = [turn[form] for turn in turns]
        median = {k: float(np.median([s[k] for s in samples])) for k in ("seconds", "peak", "held")}
        rows.append({"form": form, **median, "samples": samples})
    console = make_console()
    console.print(
        f"{_TARGET.value}: {size / 1e6:.0f} MB of bfloat16 in {_SHARDS.value} shards, loaded as "
        f"{_DTYPE.value} on {turns[0]['naive']['device']}; {cores()} cores, median of "
        f"{_REPEATS.value}"
    )
    cells = [
        (r["form"], f"{r['seconds']:.2f}", f"{r['held'] / 1e6:.0f}", f"{r['peak'] / 1e6:.0f}",
         f"{r['peak'] / r['held']:.2f}")
        for r in rows
    ]  # fmt: skip
    title = "Loading: host memory at its peak, the CPU's devices included"
    print_rows(console, "way | s | parameters MB | peak MB | peak / parameters", cells, title)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    commands.run(main)
