"""`law` and `verify`: a rule's exact law and its fast sampler, on one drafted tree."""

import jax
import numpy as np

from specjax.trees import DraftTree
from specjax.verification.base import LogitRows, Noise, Rule, Tree, VerifyOut


def law(draft: DraftTree, target_logp, rule: Rule, force_T=None) -> tuple[np.ndarray, np.ndarray]:
    """The node law of `rule` in float64: the oracle of every test.

    Args:
      draft: one sequence's tree, arrays of any kind. `law_TxV` holds the log-probabilities that
        drew each node's children; without it every child counts as a point mass.
      target_logp: log p_TxV, after the filter; -inf is allowed.
      rule: from `get_rule`.
      force_T: nodes that a rule with `forces` accepts anyway.

    Returns:
      (stop_T, next_TxV): the probability that the walk ends at each node, and the law of the token
      emitted there (rows of nodes never stopped at are zero).

    Raises:
      ValueError: a mask for a rule that cannot force nodes.
    """
    _check_mask(rule, force_T)
    tokens = np.asarray(draft.tokens_T)
    parents, valid = np.asarray(draft.parent_T), np.asarray(draft.valid_T, bool)
    if rule.orderless:
        rows = range(1, len(tokens))
        table = [[i for i in rows if parents[i] == v] for v in range(len(tokens))]
    else:
        table = np.asarray(draft.child_TxC).tolist()
    children = tuple(tuple(c for c in row if c >= 0 and valid[c]) for row in table)
    with np.errstate(divide="ignore"):
        p_TxV = np.exp(np.asarray(target_logp, np.float64))
        q_TxV = None if draft.law_TxV is None else np.exp(np.asarray(draft.law_TxV, np.float64))
    force = np.zeros(len(tokens), bool) if force_T is None else np.asarray(force_T, bool)
    return rule.law(Tree(tokens, children, p_TxV, q_TxV, force))


def _check_mask(rule: Rule, force_T) -> None:
    if force_T is not None and not rule.forces:
        raise ValueError(f"force_T: rule {rule.name!r} cannot force nodes")


def verify(noise: Noise, draft: DraftTree, target_logp, rule: Rule, force_T=None) -> VerifyOut:
    """Samples from `law` with explicit noise: a pure function, jit and vmap at will.

    Takes one sequence, or a batch of them (a leading B on every array).

    Raises:
      ValueError: as `law`.
    """
    _check_mask(rule, force_T)
    if draft.tokens_T.ndim == 2:
        one = lambda n, d, p, f: verify(n, d, p, rule, f)  # noqa: E731
        return jax.vmap(one)(noise, draft, target_logp, force_T)
    return rule.verify(noise, draft, LogitRows(target_logp), force_T)
