"""AdaSPEC: train on the tokens where the drafter lags furthest behind a reference drafter.

Source: arXiv 2510.19779. Fraction 0.4 as published; ranked within each depth (ours). The reference
is the same cascade, from the same start, trained plainly for as many steps: twice the cost.

Command: python -m experiments.main --config=configs/distill/adaspec.py
"""

from configs.distill import single

ROWS = {"adaspec": {"train": {"loss": {"gate": "adaspec", "gate_options": {"fraction": 0.4}}}}}


def get_config(preset: str = ""):
    """FastEagle alone under this objective; presets of configs/fasteagle.py."""
    return single("adaspec", ROWS, preset)
