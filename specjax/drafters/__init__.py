"""Drafters by name. A new drafter is one file here and one entry in `DRAFTERS`."""

from specjax.drafters.base import Committed, Context, Drafter, Vanilla
from specjax.drafters.dflash import DFlash
from specjax.drafters.draft_model import DraftModel
from specjax.drafters.eagle3 import Eagle3
from specjax.drafters.fasteagle import FastEagle
from specjax.drafters.fasteagle_x import FastEagleX
from specjax.drafters.kangaroo import Kangaroo
from specjax.drafters.medusa import Medusa
from specjax.drafters.p_eagle import PEagle
from specjax.drafters.prompt_lookup import PromptLookup
from specjax.drafters.rasd import Rasd
from specjax.drafters.token_recycling import TokenRecycling

_ALL = (
    FastEagle,
    FastEagleX,
    Eagle3,
    PEagle,
    DFlash,
    Medusa,
    DraftModel,
    Kangaroo,
    PromptLookup,
    TokenRecycling,
    Rasd,
)
DRAFTERS: dict[str, type[Drafter]] = {drafter.name: drafter for drafter in _ALL}


def drafter_names() -> tuple[str, ...]:
    """Names that `init_drafter` knows."""
    return tuple(DRAFTERS)


__all__ = ["DRAFTERS", "Committed", "Context", "Drafter", "Vanilla", "drafter_names"]
