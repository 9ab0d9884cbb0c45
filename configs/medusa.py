"""Medusa heads against plain decoding: what a drafter without layers of its own can do.

Source: arXiv 2401.10774 (Medusa-1: the target stays as it is). Published speedups are 2.2x and
more, and with the target trained too (Medusa-2) up to 3.6x; Spec-Bench measures 1.7x to 1.8x and a
tau of 2.3 to 2.4 (Vicuna 7B and 13B, four heads, 63 nodes). Here heads share the target's LM head
and every rule is exact, so expect less. The released training sums the heads' losses unweighted;
`decay` stays at this project's 0.8, for all drafters alike. Data and steps are those of
configs/fasteagle.py, at its seven tree rows.

Command: python -m experiments.main --config=configs/medusa.py[:smoke]
"""

from ml_collections import ConfigDict

from configs import common, fasteagle


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target) and "smoke"."""
    config = fasteagle.alone("medusa", preset)
    config.drafters.medusa = common.drafter(
        "medusa",
        init=dict(heads=3),
        tree=dict(tree_nodes=6),
        budgets=() if preset else (dict(tree_nodes=3), dict(tree_nodes=15)),
    )
    return config
