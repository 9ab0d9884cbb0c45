"""FastDraft's mixed loss: half the text's own tokens, half the target's distribution.

Source: arXiv 2411.11055, which found no clear winner among its losses.

Command: python -m experiments.main --config=configs/distill/fastdraft.py
"""

from configs.distill import single

ROWS = {"fastdraft": {"train": {"loss": {"ce": 0.5, "hard": 0.5}}}}


def get_config(preset: str = ""):
    """FastEagle alone under this objective; presets of configs/fasteagle.py."""
    return single("fastdraft", ROWS, preset)
