"""One file an objective: `ROWS` maps row names to what each changes of a drafter's init and train.

configs/distillation.py compares all of them; run alone, a recipe trains FastEagle under its first
row and compares it with plain decoding.
"""

from ml_collections import ConfigDict

from configs import fasteagle


def single(name: str, rows: dict, preset: str = "") -> ConfigDict:
    """configs/fasteagle.py without EAGLE-3, with one row's objective and under its name."""
    config, changes = fasteagle.get_config(preset), rows[name]
    config.name = name
    del config.drafters.eagle3
    drafter = config.drafters.fasteagle
    drafter.init.update(changes.get("init", {}))
    drafter.train = ConfigDict(changes.get("train", {}))
    return config
