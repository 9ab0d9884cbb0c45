"""Runs a recipe.

python -m experiments.main --config=configs/NAME.py[:preset] [--workdir=DIR] [--config.field=value]
"""

import importlib

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "run folder; a rerun with the same one resumes")
flags.mark_flag_as_required("config")

# config.experiment -> the function that runs it, imported only when asked for
EXPERIMENTS = {
    "pretrain": "specjax.training.pretrain:pretrain",
    "compare": "experiments.compare:compare",
    "distill": "experiments.distillation:distill",
}


def main(argv):
    del argv
    from absl import logging

    from specjax.training.progress import say
    from specjax.training.run import open_run

    logging.set_verbosity(logging.WARNING)  # orbax narrates every step of a save at INFO
    config = _CONFIG.value
    if config.experiment not in EXPERIMENTS:
        raise app.UsageError(
            f"experiment: {config.experiment!r} is unknown; one of {sorted(EXPERIMENTS)}"
        )
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    folder = open_run(_WORKDIR.value, config, overrides)
    say(f"{config.name}: run folder {folder}")
    module, function = EXPERIMENTS[config.experiment].split(":")
    getattr(importlib.import_module(module), function)(config, folder)


if __name__ == "__main__":
    app.run(main)
