"""Lenient speculative sampling on a chain: accept x with probability min(1, p(x)/(l q(x))). Lossy.

Source: Leviathan et al. 2211.17192, appendix on lenience. The first rejected token is replaced by
a draw from norm([p - l q]+). At l = 1 this is `token`; towards 0 whatever the target allows at all
is accepted. Every step emits x with a probability of at most p(x)/l.
"""

import dataclasses
from typing import ClassVar

from specjax.verification.token import Token


@dataclasses.dataclass(frozen=True)
class Lenient(Token):
    """Token-level speculative sampling against the draft's law times `lenience`."""

    name: ClassVar[str] = "lenient"
    exact: ClassVar[bool] = False

    lenience: float = 0.5

    def __post_init__(self):
        if not 0 < self.lenience <= 1:
            raise ValueError(f"rule 'lenient': lenience {self.lenience} must be in (0, 1]")
