"""What test_processes.py runs: trains a toy drafter as one process of a run of COUNT.

python one_of_two.py FOLDER INDEX COUNT PORT MESH [DIE_AT [SIGNAL]]

Process 1 sends itself SIGNAL (SIGKILL) ahead of step DIE_AT.
"""

import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
from toys import random_target

from configs import common
from specjax import init_drafter, processes, sharding
from specjax.data.rows import Rows
from specjax.models.target import Target
from specjax.training.drafter import TauProbe, train_drafter
from specjax.training.metrics import MetricsLog


def main(folder, index, count, port, mesh, die_at="-1", name="SIGKILL"):
    folder = pathlib.Path(folder)
    if int(count) > 1:
        processes.join(f"localhost:{port}", int(count), int(index), timeout=60)
    mesh = sharding.make_mesh(tuple(map(int, mesh.split(","))))
    plain = random_target(vocab_size=64, num_layers=3)
    params = sharding.place(plain.params, sharding.shardings(mesh, plain.params))
    target = Target(plain.name, plain.config, params, None, mesh)
    drafter = init_drafter("fasteagle", target, seed=1, num_layers=2)

    cfg = common.base("test", "").train
    cfg.steps, cfg.batch_size, cfg.checkpoint_every, cfg.log_every, cfg.tau_every = 6, 4, 2, 1, 6
    if name == "SIGTERM":  # is looked for once a second, so there have to be steps for it to end
        cfg.steps = cfg.checkpoint_every = cfg.tau_every = 60
    cfg.optimizer = common.optimizer(learning_rate=1e-2, warmup_steps=1)
    cfg.optimizer.eps = 1e-4  # other devices' rounding is then not amplified
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (10, 16)).astype(np.int32)
    rows = {"tokens": tokens, "supervised": np.ones((10, 16), bool)}
    share = sharding.process_share(mesh, 4)
    stream = Rows(rows, 4, 0, *share)
    assert len(stream.batch(0)["tokens"]) * share[1] == 4

    def batch(step, drafter):
        if step == int(die_at) and jax.process_index() == 1:
            os.kill(os.getpid(), getattr(signal, name))
        if name == "SIGTERM":
            time.sleep(0.2)
        return stream.batch(step, drafter)

    with processes.only_writer(folder):
        drafter, cost = train_drafter(
            target, drafter, cfg, batch, {}, TauProbe([[1, 2, 3], [4, 5]], 8), folder,
            MetricsLog(folder / "metrics.jsonl"), "fasteagle", mesh,
        )  # fmt: skip
        drafter.save(folder / "drafter")
    print(f"process {jax.process_index()} of share {share}: {cost.tokens} tokens", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
