"""Verification rules by name. A new rule is one file here and one entry in `_RULES`."""

from specjax.verification.base import Noise, Rule, VerifyOut, make_noise
from specjax.verification.block import Block
from specjax.verification.judge import Judge, JudgeHead
from specjax.verification.k_seq import KSeq
from specjax.verification.lenient import Lenient
from specjax.verification.match import Greedy, Match
from specjax.verification.node_law import law, verify
from specjax.verification.recursive import RecursiveRejection
from specjax.verification.token import Token
from specjax.verification.traversal import Traversal
from specjax.verification.typical import Typical
from specjax.verification.unverified import Unverified

_RULES = {
    rule.name: rule
    for rule in (
        Greedy, Match, Token, Block, RecursiveRejection, KSeq, Traversal,
        Typical, Lenient, Judge, Unverified,
    )
}  # fmt: skip


def rule_names() -> tuple[str, ...]:
    """Names that `get_rule` knows."""
    return tuple(_RULES)


def get_rule(name: str, **parameters) -> Rule:
    """A rule object by name.

    Raises:
      ValueError: unknown name (lists the known ones) or unknown parameter.
    """
    if name not in _RULES:
        raise ValueError(f"rule: {name!r} is unknown; one of {rule_names()}")
    try:
        return _RULES[name](**parameters)
    except TypeError as error:
        raise ValueError(f"rule {name!r}: {error}") from error


__all__ = [
    "JudgeHead",
    "Noise",
    "Rule",
    "VerifyOut",
    "get_rule",
    "law",
    "make_noise",
    "rule_names",
    "verify",
]
