"""Layer-wise cross-entropy against the target's distribution: what the others are compared with.

Source: arXiv 2509.20416 (FastEagle) supervises every layer; its loss is not publicly confirmed, and
this one is our default.

Command: python -m experiments.main --config=configs/distill/plain.py
"""

from configs.distill import single

ROWS = {"plain": {}}


def get_config(preset: str = ""):
    """FastEagle alone under this objective; presets of configs/fasteagle.py."""
    return single("plain", ROWS, preset)
