"""The same drafter under every training objective, at equal tokens, steps and seeds.

Sources and what is ours: docs/distillation.md; each objective is a recipe of its own in
configs/distill/. Every row is one objective and seed, decoded at temperature 0 on held-out prompts
with the shared tree; differences from `fasteagle/plain` are paired by seed, corrected for their
number (Holm), and the best one is trained again, with plain, on fresh seeds.

Commands:
  python -m experiments.main --config=configs/distillation.py          built-in target, CPU
  python -m experiments.main --config=configs/distillation.py:draft_model
  python -m experiments.main --config=configs/distillation.py:smoke    all of it, small, for CI
"""

import importlib

from ml_collections import ConfigDict

from configs import common, draft_model, fasteagle

OBJECTIVES = (
    "plain", "speckd", "adaspec", "online", "deepkd", "fspad", "distillspec", "fastdraft",
)  # fmt: skip
"""Modules of configs.distill; each maps row names to (what it changes of init, of train)."""

DRAFT_MODEL = ("plain", "distillspec", "fastdraft")
"""Those that were made for a small language model."""

SMOKE = ("plain", "adaspec", "deepkd", "distillspec_mix", "fspad")
"""One row of each mechanism: a gate with a reference, streams, own text, another architecture."""


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target), "draft_model" (DistillSpec's own drafter) and "smoke"."""
    if preset not in ("", "draft_model", "smoke"):
        raise ValueError(
            f"distillation: unknown preset {preset!r}; one of '', 'draft_model', 'smoke'"
        )
    small = "smoke" if preset == "smoke" else ""
    if preset == "draft_model":
        config, family, objectives = draft_model.get_config(small), "draft_model", DRAFT_MODEL
    else:
        config, family, objectives = fasteagle.get_config(small), "fasteagle", OBJECTIVES
    config.name, config.experiment, config.preset = "distillation", "distill", preset
    plain = config.drafters[family]
    config.drafters = ConfigDict()
    for name in objectives:
        recipe = importlib.import_module(f"configs.distill.{name}")
        for row, changes in recipe.ROWS.items():
            config.drafters[f"{family}/{row}"] = common.drafter(
                family,
                init=plain.init.to_dict() | changes.get("init", {}),
                tree=plain.tree.to_dict(),
                train=changes.get("train"),
            )
    config.seeds = (0, 1, 2)
    config.confirm_seeds = (10, 11, 12)  # on which the best objective meets plain again
    config.eval.temperatures = (0.0,)
    config.train.tau_every = 0
    config.train.checkpoint_every = 0
    if preset == "smoke":
        for row in set(config.drafters) - {f"fasteagle/{row}" for row in SMOKE}:
            del config.drafters[row]
        config.seeds, config.confirm_seeds = (0, 1), (10, 11)
        config.train.steps = 4
    else:
        config.data.count, config.train.steps = 256, 120
        config.eval.prompts, config.eval.max_new_tokens = 32, 64
    return config
