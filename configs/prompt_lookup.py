"""Prompt lookup against plain decoding: no model, no training, no state.

Source: Saxena 2023 (Prompt Lookup Decoding): n-grams up to 3, 10 tokens a draft, about 2.4x on
summarisation and questions about a context (Mistral-7B, one A100, greedy). It pays where answers
quote their prompt or themselves: on the built-in target's greedy answers about 3 tokens a round
with 10 drafted, 1.1 at temperature 1. Verifying rows is dear on a CPU, so fewer are drafted here.

Command: python -m experiments.main --config=configs/prompt_lookup.py[:smoke]
"""

from ml_collections import ConfigDict

from configs import common, fasteagle


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target) and "smoke"."""
    config = fasteagle.alone("prompt_lookup", preset)
    config.data.count = config.data.batch = 16  # prompts to calibrate on: nothing is trained
    config.eval.rule = ""  # what is looked up was not drawn from any law
    config.drafters.prompt_lookup = common.drafter(
        "prompt_lookup",
        init=dict(max_ngram=3),
        tree=dict(draft_depth=6),
        budgets=() if preset else (dict(draft_depth=3), dict(draft_depth=10)),
    )
    return config
