"""SpecKD: train where the target accepts what the drafter proposes.

Source: arXiv 2510.24021 (v1 SpecKD, v2 SelecTKD). Defaults as reported: k = 5, beta = 0.01. Ours:
beta falls from 1 over the first 40 steps, for a cold drafter is rejected everywhere; the `prefix`
row counts a depth as accepted only if all shallower ones are, as decoding does.

Command: python -m experiments.main --config=configs/distill/speckd.py
"""

from configs.distill import single

_GATE = {"k": 5, "beta": 0.01, "warmup_steps": 40}
ROWS = {
    "speckd": {"train": {"loss": {"gate": "speckd", "gate_options": _GATE}}},
    "speckd_prefix": {
        "train": {"loss": {"gate": "speckd", "gate_options": _GATE | {"prefix": True}}}
    },
}


def get_config(preset: str = ""):
    """FastEagle alone under this objective; presets of configs/fasteagle.py."""
    return single("speckd", ROWS, preset)
