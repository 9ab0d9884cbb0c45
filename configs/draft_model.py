"""A small model of the target's family as drafter, distilled in the run: two-model speculation.

Source: arXiv 2211.17192, 2302.01318 (speculative sampling); arXiv 2310.08461 (DistillSpec), whose
choice of divergence is `--config.train.loss.divergence=`. Two layers at the target's width, started
from its embedding and head, on the data and steps of configs/fasteagle.py. A ready model of the
same vocabulary needs no training: `specjax.init_drafter("draft_model", target, folder=FOLDER)`.

Command: python -m experiments.main --config=configs/draft_model.py[:smoke]
"""

from ml_collections import ConfigDict

from configs import common, fasteagle


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target) and "smoke"."""
    config = fasteagle.alone("draft_model", preset)
    config.drafters.draft_model = common.drafter(
        "draft_model",
        init=dict(num_layers=2, draft_depth=3),
        tree=dict(draft_depth=3),
        budgets=() if preset else (dict(draft_depth=2), dict(draft_depth=4)),
    )
    # One child a node: every exact rule but the tree ones sees the same chain.
    config.eval.rule = "block"
    return config
