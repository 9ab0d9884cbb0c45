"""Runs a recipe.

python -m experiments.main --config=configs/NAME.py[:preset] [--workdir=DIR] [--config.field=value]

On several hosts: the same command on each, with --distributed (docs/tpu_pod.md, docs/slurm.md).
"""

import contextlib
import importlib
import json
import pathlib

from absl import app, flags
from ml_collections import config_flags

from experiments import commands

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "run folder; a rerun with the same one resumes")
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "steps and rounds of every stage to trace into the run folder's profile/"
)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "this is one of several processes")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where the cluster does not tell"
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are")
_PROCESS = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
_TIMEOUT = flags.DEFINE_integer("timeout", 300, "seconds to wait for a process that is missing")
flags.mark_flag_as_required("config")

# config.experiment -> the function that runs it, imported only when asked for
EXPERIMENTS = {
    "pretrain": "specjax.training.pretrain:pretrain",
    "compare": "experiments.compare:compare",
    "distill": "experiments.distillation:distill",
}


# Kinds that run on several hosts; the others decode and train pair by pair.
DISTRIBUTED = ("compare",)


def main():
    from absl import logging

    from specjax import processes, profiling
    from specjax.preemption import Preempted, leave_on_sigterm
    from specjax.progress import say
    from specjax.training.run import open_run, plain

    verbose = logging.get_verbosity() == logging.DEBUG
    logging.set_verbosity(logging.WARNING)  # orbax narrates every step of a save at INFO
    config = _CONFIG.value
    if config.experiment not in EXPERIMENTS:
        raise app.UsageError(
            f"experiment: {config.experiment!r} is unknown; one of {sorted(EXPERIMENTS)}"
        )
    if _DISTRIBUTED.value:
        if config.experiment not in DISTRIBUTED:
            raise app.UsageError(
                f"--distributed: experiment {config.experiment!r} runs in one process; "
                f"{DISTRIBUTED} run in several"
            )
        if not _WORKDIR.value:
            raise app.UsageError("--distributed needs --workdir, a folder that every host sees")
        processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _TIMEOUT.value)
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    module, function = EXPERIMENTS[config.experiment].split(":")
    try:
        with contextlib.ExitStack() as held:
            with commands.refusals():
                processes.check_same("--config", json.dumps(plain(config), sort_keys=True))
                opened = processes.first(lambda: str(open_run(_WORKDIR.value, config, overrides)))
                folder = pathlib.Path(opened)
                processes.check_shared("--workdir", folder)
                held.enter_context(processes.only_writer(folder))
            leave_on_sigterm()
            profiling.enable(folder / "profile", _PROFILE.value)
            say(f"{config.name}: run folder {folder}")
            getattr(importlib.import_module(module), function)(config, folder)
    except Preempted as stopped:
        say(stopped.message)
        raise  # SystemExit with a status of its own
    except commands.Refused as error:
        if verbose:
            raise
        raise app.UsageError(f"{error}\n(--verbosity=1 shows where)") from error


if __name__ == "__main__":
    commands.run(main)
