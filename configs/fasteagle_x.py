"""FastEagle X: what a transition bias and a tree that pays add to FastEagle, one by one.

Source: the bias follows DSpark's Markov head (arXiv 2607.05147), growing trees from marginals
DDTree (arXiv 2604.12989); on a cascade both are this project's own, so no figures are published.
Every row has as many tree rows, trained tokens and seeds; differences from `fasteagle/plain` are
paired by seed and corrected for their number (Holm), and the best one meets plain on fresh seeds.

  fasteagle/bias        the transition bias on FastEagle's backbone
  fasteagle/paths       no bias, the static tree that pays best on training text
  fasteagle/bias_paths  both
  fasteagle/bias_grown  the bias, and a tree grown every round

Command: python -m experiments.main --config=configs/fasteagle_x.py[:smoke]
"""

from ml_collections import ConfigDict

from configs import common, fasteagle

NODES, RANK = 7, 32


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target) and "smoke"."""
    config = fasteagle.alone("fasteagle_x", preset, keep=("fasteagle",))
    config.experiment = "distill"
    plain = config.drafters.fasteagle
    init, tree = plain.init.to_dict(), plain.tree.to_dict()
    config.drafters = ConfigDict()
    grown = dict(draft_depth=3, candidates=3, total_nodes=NODES)
    variants = {
        "plain": ("fasteagle", {}, tree),
        "bias": ("fasteagle_x", dict(rank=RANK), tree),
        "paths": ("fasteagle_x", {}, dict(best_nodes=NODES)),
        "bias_paths": ("fasteagle_x", dict(rank=RANK), dict(best_nodes=NODES)),
        "bias_grown": ("fasteagle_x", dict(rank=RANK), grown),
    }
    for name, (family, changes, shape) in variants.items():
        row = common.drafter(family, init=init | changes, tree=shape)
        config.drafters[f"fasteagle/{name}"] = row
    config.seeds, config.confirm_seeds = (0, 1, 2), (10, 11, 12)
    config.eval.temperatures = (0.0,)
    config.train.tau_every = 0
    config.train.checkpoint_every = 0
    if preset == "smoke":
        config.seeds, config.confirm_seeds = (0, 1), (10, 11)
        config.train.steps = 4
    else:
        config.data.count, config.train.steps = 256, 120
        config.eval.max_new_tokens = 64
    return config
