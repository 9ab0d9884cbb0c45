"""Kangaroo: the target's first layers and an adapter draft, as far as they are confident.

Source: arXiv 2404.18911. Published: up to 1.68x on Spec-Bench with an adapter of 67M parameters
beside Vicuna-7B, whose first 2 of 32 layers draft (3 of 40 at 13B), at most 6 tokens, stopping
below a probability of 0.6 (0.4 by default in the released code). Released training: AdamW at 5e-5,
20 epochs of ShareGPT. Here: the built-in target's first 2 of 24 layers, on the data and steps of
configs/fasteagle.py, give tau 1.38 [1.32, 1.44] on 32 prompts at temperature 0, 35% of first tokens
accepted. Seven tree rows are verified whether a draft stops early or not: a tree has one shape.

Command: python -m experiments.main --config=configs/kangaroo.py[:smoke]
"""

from ml_collections import ConfigDict

from configs import common, fasteagle


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target) and "smoke"."""
    config = fasteagle.alone("kangaroo", preset)
    config.drafters.kangaroo = common.drafter(
        "kangaroo",
        init=dict(exit_layer=2),
        tree=dict(draft_depth=6, threshold=0.6),
        budgets=() if preset else (dict(draft_depth=3), dict(draft_depth=3, threshold=0.4)),
    )
    # One child a node: every exact rule but the tree ones sees the same chain.
    config.eval.rule = "block"
    return config
