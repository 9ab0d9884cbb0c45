"""P-EAGLE against plain decoding: one pass over mask rows in place of a cascade's readouts.

Source: arXiv 2602.01469, which reports 1.10x to 1.36x over EAGLE-3 (gpt-oss 20B and 120B,
Qwen3-Coder-30B) and longer acceptance from four layers than from one. Here two layers, a third of
the target's MLP width as FastEagle's and EAGLE-3's, on the data and steps of configs/fasteagle.py,
at its seven tree rows; as in the paper, all depths weigh alike.

Command: python -m experiments.main --config=configs/p_eagle.py[:smoke]
"""

from ml_collections import ConfigDict

from configs import common, fasteagle


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target) and "smoke"."""
    config = fasteagle.alone("p_eagle", preset)
    config.drafters.p_eagle = common.drafter(
        "p_eagle",
        init=dict(num_layers=2, draft_depth=3, intermediate_size=128),
        tree=dict(draft_depth=3, candidates=2),
        budgets=()
        if preset
        else (
            dict(draft_depth=3, candidates=1),
            dict(draft_depth=2, candidates=3),
        ),
        train=dict(loss=dict(decay=1.0)),
    )
    return config
