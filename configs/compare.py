"""Every drafter on one target: same training tokens, same node budget, same prompts, one table.

Sources: each drafter's own recipe names its paper. All that train do so on the same rows for the
same steps; `prompt_lookup` and `token_recycling` have nothing to train; `fasteagle_x` is FastEagle
with the tree that pays best on training text, `rasd` FastEagle with what it retrieves from the
request so far and the training rows. No tree has more than 7 rows, the root included; chains have
what their depth asks for.

Commands:
  python -m experiments.main --config=configs/compare.py          built-in target, CPU
  python -m experiments.main --config=configs/compare.py:smoke    all of it, small, for CI
"""

from ml_collections import ConfigDict

from configs import (
    common,
    dflash,
    draft_model,
    fasteagle,
    kangaroo,
    medusa,
    p_eagle,
    prompt_lookup,
    rasd,
    token_recycling,
)

RECIPES = (draft_model, kangaroo, prompt_lookup, token_recycling, rasd, medusa, p_eagle, dflash)
NODES = 7


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target) and "smoke"."""
    if preset not in ("", "smoke"):
        raise ValueError(f"compare: unknown preset {preset!r}; one of '', 'smoke'")
    config = fasteagle.get_config(preset)
    config.name = "compare"
    plain = config.drafters.fasteagle
    config.drafters.fasteagle_x = common.drafter(
        "fasteagle_x", init=plain.init.to_dict(), tree=dict(best_nodes=NODES)
    )
    for recipe in RECIPES:
        for name, drafter in recipe.get_config(preset).drafters.items():
            if name == drafter.drafter and name not in config.drafters:  # one row a family
                config.drafters[name] = drafter
    config.drafters.token_recycling.tree = ConfigDict(dict(tree_nodes=NODES - 1))
    # Retrieval gets the rows that a chain leaves of the budget.
    chain = dict(draft_depth=3, candidates=1)
    config.drafters.rasd.tree = ConfigDict(dict(inner_options=chain, retrieved_nodes=NODES - 4))
    for drafter in config.drafters.values():
        drafter.budgets = ()  # one tree each: the comparison is at equal nodes
    config.eval.rule = ""  # drafters that draw nothing serve sample-and-match
    config.calibrate.prompts = 0
    return config
