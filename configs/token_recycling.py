"""Token recycling against plain decoding: no model, no training, a matrix that learns from use.

Source: arXiv 2408.08696: 8 successors a token, 80 drafted rows, about 2x at all sizes (2.22x with
2.73 tokens a round for Vicuna-7B on Spec-Bench, one A100, greedy; 1.40x on an RTX 3090, where 81
rows are compute-bound). On a CPU verifying rows is dear, so the built-in preset drafts few of them.

Command: python -m experiments.main --config=configs/token_recycling.py[:smoke]
"""

from ml_collections import ConfigDict

from configs import common, fasteagle


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target) and "smoke"."""
    config = fasteagle.alone("token_recycling", preset)
    config.data.count = config.data.batch = 16  # prompts to calibrate on: nothing is trained
    config.eval.rule = ""  # what is recycled was not drawn from any law
    config.drafters.token_recycling = common.drafter(
        "token_recycling",
        init=dict(successors=8),
        tree=dict(tree_nodes=15),
        budgets=() if preset else (dict(tree_nodes=7), dict(tree_nodes=31)),
    )
    return config
