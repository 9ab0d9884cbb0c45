"""What test_processes.py runs: one process of two that see different things, and must agree.

python agreeing.py FOLDER INDEX PORT

FOLDER holds `features`, the whole cache of `rows()`. Prints one JSON object: what came of it.
"""

import json
import os
import pathlib
import signal
import sys
import time

import numpy as np
from toys import random_target

from specjax import preemption, processes, sharding
from specjax.data.feature_cache import FeatureCache
from specjax.files import write_npz, write_safetensors, write_text
from specjax.models.target import Target

TAPS = (1, 3)


def rows() -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(0).integers(0, 64, (6, 8)).astype(np.int32)}


def target(mesh=None) -> Target:
    """With a mesh: its weights split over processes."""
    plain = random_target(vocab_size=64, num_layers=3)
    if mesh is None:
        return plain
    params = sharding.place(plain.params, sharding.shardings(mesh, plain.params))
    return Target(plain.name, plain.config, params, None, mesh)


def error_of(do) -> str | None:
    try:
        do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(folder, index, port):
    processes.join(f"localhost:{port}", 2, int(index), timeout=60)
    folder, found = pathlib.Path(folder), {}
    own = folder / f"of-{index}"
    own.mkdir()

    found["everyones"] = processes.everyones("é" * (1 + int(index)))
    found["same folder"] = error_of(lambda: processes.check_shared("--workdir", folder))
    found["own folder"] = error_of(lambda: processes.check_shared("--workdir", own, seconds=0.3))

    def fail_on(failing, name=""):
        if index in failing:
            raise FileNotFoundError(f"shard{name}: missing")
        return f"of {index}"

    found["none fail"] = processes.together(lambda: fail_on(""))
    found["one fails"] = error_of(lambda: processes.together(lambda: fail_on("1")))
    found["all fail"] = error_of(lambda: processes.together(lambda: fail_on("01")))
    found["the first fails"] = error_of(lambda: processes.first(lambda: fail_on("0")))

    write_text(own / "text", "")
    write_npz(own / "array.npz", zero=np.zeros(1))
    write_safetensors(own / "model.safetensors", {"zero": np.zeros(1)})
    found["written"] = sorted(path.name for path in own.iterdir())

    mesh = sharding.make_mesh((1, 2, 1))
    cache = FeatureCache(folder / "features", target(mesh), TAPS, rows(), 2)
    found["taps"] = cache.batch([4])["taps"].tolist()

    # Two stages of three questions; the signal comes in between.
    found["asked"] = [preemption.due() for _ in range(3)]
    if index == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)
    found["asked"] += [preemption.due() for _ in range(3)]
    print("found", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
