"""DistillSpec: the choice of divergence.

Source: arXiv 2310.08461. A cascade never reads its own tokens, so on-policy data means text of the
target's own (`data.regenerate`), which all rows train on. Jensen-Shannon at beta 0.5, and total
variation, whose complement is the acceptance rate.

Command: python -m experiments.main --config=configs/distill/distillspec.py
"""

from configs.distill import single

ROWS = {
    "distillspec": {"train": {"loss": {"divergence": "jensen_shannon"}}},
    "distillspec_tvd": {"train": {"loss": {"divergence": "total_variation"}}},
}


def get_config(preset: str = ""):
    """FastEagle alone under this objective; presets of configs/fasteagle.py."""
    return single(ROWS["distillspec"], preset)
