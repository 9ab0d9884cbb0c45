"""What a recipe will need, before anything is paid for: memory, time, disk, on a named chip.

python -m experiments.estimate --config=configs/NAME.py[:preset] [--devices=N] [--accelerator=NAME]
    [--compile] [--config.field=value]

Nothing is loaded, allocated or fetched. `--compile` also compiles the training steps and rounds for
as many simulated CPU devices and prints their memory beside the estimate's. docs/planning.md says
how to read it.
"""

import os

from absl import app, flags
from ml_collections import config_flags

from experiments import commands

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_DEVICES = flags.DEFINE_integer("devices", 1, "chips to plan for", lower_bound=1)
_CHIP = flags.DEFINE_string("accelerator", "h100", "one of the table in docs/planning.md")
_COMPILE = flags.DEFINE_bool("compile", False, "compile too, and compare")
flags.mark_flag_as_required("config")


def geometry(name: str):
    """The target's geometry: of a local folder, of the hub's cache, or as published."""
    from huggingface_hub import try_to_load_from_cache

    from specjax.models.config import read_config
    from specjax.models.known import KNOWN
    from specjax.models.target import resolve_folder

    if name == "builtin" or os.path.isdir(name):
        return read_config(resolve_folder(name))
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
    if isinstance(cached, str):
        return read_config(os.path.dirname(cached))
    if name not in KNOWN:
        raise ValueError(
            f"target.name: {name!r} is no folder, not in the hub's cache and not among the "
            f"geometries known offline, {tuple(KNOWN)}"
        )
    return KNOWN[name]


def contenders(config, target):
    """The drafters of a config."""
    from experiments.compare import (
        any_paths,
        budgets_of,
        drafter_rules,
        init_of,
        is_ready,
    )
    from experiments.training_data import train_config
    from specjax.drafters import DRAFTERS
    from specjax.planning.estimate import Contender

    found = []
    for name, cfg in config.drafters.items():
        if cfg.drafter not in DRAFTERS:
            raise ValueError(f"drafter: {cfg.drafter!r} is unknown; one of {tuple(DRAFTERS)}")
        init = init_of(cfg)
        if "folder" in init:
            init["own_model"] = geometry(init.pop("folder"))
        definition = DRAFTERS[cfg.drafter].of(target, init)
        trees = tuple(definition.with_budget(**any_paths(b)) for b in budgets_of(cfg))
        rules = drafter_rules(config, definition)
        trains = definition.trained and not is_ready(cfg)
        train = train_config(config, name) if trains else None
        found.append(Contender(name, definition, trees, train, rules))
    return found


def plan(config, chip):
    """The estimate of a config over all devices there are."""
    from specjax.planning.estimate import estimate
    from specjax.sharding import make_mesh

    target = geometry(config.target.name)
    return estimate(config, target, contenders(config, target), make_mesh(config.mesh), chip)


def main():
    import jax

    # Before anything else asks jax for devices: they are what the run would have.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    from specjax.planning.accelerators import get_accelerator
    from specjax.planning.advice import advise
    from specjax.planning.tables import show, show_advice, show_compiled

    config = _CONFIG.value
    try:
        if config.experiment == "pretrain":
            raise ValueError(f"experiment: {config.name!r} trains no drafter; nothing to plan")
        chip = get_accelerator(_CHIP.value)
        found = plan(config, chip)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    show(config, found)
    if not found.fits:
        print("Changes tried on paper:")
        show_advice(found, *advise(config, found, lambda other: plan(other, chip)))
    if _COMPILE.value:
        from specjax.planning.compiled import compile_all

        target = geometry(config.target.name)
        show_compiled(compile_all(config, target, contenders(config, target), found))


if __name__ == "__main__":
    commands.run(main)
