"""DeepKD: target-class and non-target-class gradients with a momentum each.

Source: arXiv 2505.15133. Deltas (0.075, -0.075, 0.075) and cross-entropy weight 0.1 as released;
the three momenta stand before Muon's orthogonalisation, as averages, so that they do not reweigh
the losses (ours; the paper uses SGD); their signal-to-noise ratios are logged. `deepkd_equal` has
equal momenta: what is left is the loss.

Command: python -m experiments.main --config=configs/distill/deepkd.py
"""

from configs.distill import single

ROWS = {
    "deepkd": {"train": {"loss": {"deepkd": True, "deepkd_options": {"probe": True}}}},
    "deepkd_equal": {
        "train": {"loss": {"deepkd": True, "deepkd_options": {"deltas": (0.0, 0.0, 0.0)}}}
    },
}


def get_config(preset: str = ""):
    """FastEagle alone under this objective; presets of configs/fasteagle.py."""
    return single("deepkd", ROWS, preset)
