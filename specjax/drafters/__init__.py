"""Drafters by name. A new drafter is one file here and one entry in `DRAFTERS`."""

from specjax.drafters.base import Committed, Context, Drafter, Vanilla
from specjax.drafters.draft_model import DraftModel
from specjax.drafters.eagle3 import Eagle3
from specjax.drafters.fasteagle import FastEagle
from specjax.drafters.prompt_lookup import PromptLookup
from specjax.drafters.token_recycling import TokenRecycling

DRAFTERS: dict[str, type[Drafter]] = {
    d.name: d for d in (FastEagle, Eagle3, DraftModel, PromptLookup, TokenRecycling)
}


def drafter_names() -> tuple[str, ...]:
    """Names that `init_drafter` knows."""
    return tuple(DRAFTERS)


__all__ = ["DRAFTERS", "Committed", "Context", "Drafter", "Vanilla", "drafter_names"]
