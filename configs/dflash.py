"""DFlash: a block of mask tokens denoised in one pass, the target's features in every layer.

Source: arXiv 2602.06036: five layers, five taps, blocks of 16 (10 on Llama-3.1-8B); up to 6.1 times
plain decoding on Qwen3-8B, 2.5 times the EAGLE-3 it was compared with. Here as many layers of the
same width, the same taps, data and steps as FastEagle in configs/fasteagle.py, and blocks of its
depth. Every row of the text is trained as a whole block, block_size times the drafter's work.

The paper weighs depth k by exp(-(k - 1) / gamma), gamma 7, 5 or 4 for blocks of 16, 10 or 8; that
is `loss.decay` = exp(-1 / gamma) in the drafter's own `train`. The rest of the loss is that of
every recipe, cross-entropy against the target's distribution;
`--config.train.loss.ce=0 --config.train.loss.hard=1` is the paper's.

Command: python -m experiments.main --config=configs/dflash.py[:smoke]
"""

import math

from ml_collections import ConfigDict

from configs import common, fasteagle

GAMMA = 4.0  # the paper's for its shortest blocks


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target) and "smoke"."""
    config = fasteagle.alone("dflash", preset)
    config.drafters.dflash = common.drafter(
        "dflash",
        init=dict(num_layers=3, block_size=4, intermediate_size=128),
        tree=dict(draft_depth=3, candidates=2),
        budgets=()
        if preset
        else (dict(draft_depth=3, candidates=1), dict(draft_depth=2, candidates=3)),
        train=dict(loss=dict(decay=math.exp(-1 / GAMMA))),
    )
    return config
