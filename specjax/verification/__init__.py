"""Verification rules by name. A new rule is one file here and one line in `_RULES`."""

from specjax.verification.base import Rule, VerifyOut
from specjax.verification.match import Greedy, Match

_RULES = {rule.name: rule for rule in (Greedy, Match)}


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


__all__ = ["Rule", "VerifyOut", "get_rule", "rule_names"]
