"""DistillSpec: the choice of divergence, and of who writes the training text.

Source: arXiv 2310.08461. Jensen-Shannon at beta 0.5, and total variation, whose complement is the
acceptance rate; text of the target (`train.source`, the other rows' too), of people, of the drafter
itself, or half target, half drafter. A cascade never reads its own tokens when it drafts, so text
of its own puts it where decoding never does; a small draft model (configs/draft_model.py) does read
its own.

Command: python -m experiments.main --config=configs/distill/distillspec.py
"""

from configs.distill import single

ROWS = {
    "distillspec": {"train": {"loss": {"divergence": "jensen_shannon"}}},
    "distillspec_tvd": {"train": {"loss": {"divergence": "total_variation"}}},
    "distillspec_text": {"train": {"source": "text"}},
    "distillspec_own": {"train": {"source": "drafter"}},
    "distillspec_mix": {"train": {"source": "mix"}},
}


def get_config(preset: str = ""):
    """FastEagle alone under this objective; presets of configs/fasteagle.py."""
    return single("distillspec", ROWS, preset)
