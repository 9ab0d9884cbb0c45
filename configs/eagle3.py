"""EAGLE-3 alone against plain decoding: the baseline of every comparison, by itself.

Source: arXiv 2503.01840. Published tau at temperature 0: 6.13 (Llama-3.1-8B, MT-Bench), 6.65
(Vicuna-13B). The built-in preset trains on about 200 thousand tokens; see the README for
what it reaches beside FastEagle.

Command: python -m experiments.main --config=configs/eagle3.py[:PRESET]   (presets of fasteagle.py)
"""

from ml_collections import ConfigDict

from configs import fasteagle


def get_config(preset: str = "") -> ConfigDict:
    """The presets of configs/fasteagle.py without FastEagle."""
    config = fasteagle.get_config(preset)
    config.name = "eagle3"
    del config.drafters.fasteagle
    return config
