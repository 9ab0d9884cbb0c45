"""Retrieval fused with FastEagle, beside FastEagle without it and plain decoding.

Source: arXiv 2503.03434 (RASD), which fuses retrieved trees with EAGLE-2's and reports the best
speedups on document QA, summarisation, code and in-domain QA; no per-task figures are confirmed.
Looked up are the request's own text and the training rows, continuations by the target itself: the
domain of the evaluation, but none of its prompts. The inner drafter is trained as ever;
a drafter that is trained already needs `specjax.drafters.rasd.fused(drafter, documents)` alone.

Command: python -m experiments.main --config=configs/rasd.py[:smoke]
"""

from ml_collections import ConfigDict

from configs import common, fasteagle


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (built-in target) and "smoke"."""
    config = fasteagle.alone("rasd", preset, keep=("fasteagle",))
    config.eval.rule = "match"  # what is retrieved was not drawn from a law
    inner, tree = config.drafters.fasteagle.init, config.drafters.fasteagle.tree
    config.drafters.rasd = common.drafter(
        "rasd",
        init=dict(inner="fasteagle", inner_options=inner.to_dict(), continuation=6),
        tree=dict(retrieved_nodes=8, inner_options=tree.to_dict()),
        budgets=()
        if preset
        else (
            dict(retrieved_nodes=4, inner_options=dict(draft_depth=3, candidates=1)),
            dict(retrieved_nodes=8, inner_options=dict(draft_depth=3, candidates=1)),
        ),
        corpus=True,
    )
    return config
