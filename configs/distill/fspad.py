"""FSPAD: feature sampling at the cascade's entry, separate outputs for features and logits.

Source: arXiv 2408.15562. Smooth-L1 weighs ten times the cross-entropy, as released.

Command: python -m experiments.main --config=configs/distill/fspad.py
"""

from configs.distill import single

ROWS = {
    "fspad": {
        "init": {"entry": "sampled", "partial_alignment": True},
        "train": {"loss": {"feature": 10.0}},
    }
}


def get_config(preset: str = ""):
    """FastEagle alone under this objective; presets of configs/fasteagle.py."""
    return single("fspad", ROWS, preset)
