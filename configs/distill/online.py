"""Online speculative decoding's loss: only the positions at which decoding rejected a draft.

Source: arXiv 2310.07177. Here on replay: the training text is the target's own greedy output, which
lossless decoding would emit again, so what it would have rejected is computed from the drafter's
own best tokens. `specjax.training.online` updates a drafter while it really decodes.

Command: python -m experiments.main --config=configs/distill/online.py
"""

from configs.distill import single

ROWS = {"online": {"train": {"loss": {"gate": "rejected"}}}}


def get_config(preset: str = ""):
    """FastEagle alone under this objective; presets of configs/fasteagle.py."""
    return single("online", ROWS, preset)
