"""The rules once more, from the reference's pseudocode, with switches that break them.

Each takes (draft, log p_TxV) of one draft and returns (stop_T, next_TxV); all switches at their
defaults, it must agree with the library's `law`.
"""

import numpy as np


def _read(draft, logp_TxV):
    with np.errstate(divide="ignore"):
        p_TxV, q_TxV = np.exp(logp_TxV), np.exp(draft.law_TxV)
    return p_TxV, q_TxV, np.zeros(len(p_TxV)), np.zeros_like(p_TxV)


def _share(x_V, otherwise_V):
    return x_V / x_V.sum() if x_V.sum() > 0 else otherwise_V


def token(draft, logp_TxV, raw_residual=False):
    """Token-level speculative sampling of a chain in row order.

    raw_residual: the rejected token's replacement comes from p itself.
    """
    p_TxV, q_TxV, stop_T, next_TxV = _read(draft, logp_TxV)
    n, mass = len(stop_T) - 1, 1.0
    for i in range(n):
        p_V, q_V, x = p_TxV[i], q_TxV[i], draft.tokens_T[i + 1]
        accept = min(1.0, p_V[x] / q_V[x])
        stop_T[i], mass = mass * (1 - accept), mass * accept
        next_TxV[i] = p_V if raw_residual else _share(np.maximum(p_V - q_V, 0), p_V)
    stop_T[n], next_TxV[n] = mass, p_TxV[n]
    return stop_T, next_TxV


def block(draft, logp_TxV, contiguous=False, token_residual=False):
    """Block verification of a chain in row order.

    contiguous: the first prefix not taken ends the walk. token_residual: [p - q]+ after it.
    """
    p_TxV, q_TxV, stop_T, next_TxV = _read(draft, logp_TxV)
    n, joint, taken = len(stop_T) - 1, 1.0, []
    for i in range(n + 1):
        if i:
            x = draft.tokens_T[i]
            joint = min(1.0, joint * p_TxV[i - 1, x] / q_TxV[i - 1, x])
        if i == n:
            taken.append(joint)
            next_TxV[i] = p_TxV[i]
            break
        left_V = np.maximum(joint * p_TxV[i] - q_TxV[i], 0)
        Z = left_V.sum()
        taken.append(Z / (Z + (1 - joint)) if Z + (1 - joint) > 0 else 1.0)
        if token_residual:
            left_V = np.maximum(p_TxV[i] - q_TxV[i], 0)
        next_TxV[i] = _share(left_V, p_TxV[i])
    if contiguous:
        mass = 1.0
        for i in range(n):
            stop_T[i], mass = mass * (1 - taken[i + 1]), mass * taken[i + 1]
        stop_T[n] = mass
    else:
        mass = 1.0
        for i in range(n, 0, -1):
            stop_T[i], mass = mass * taken[i], mass * (1 - taken[i])
        stop_T[0] = mass
    return stop_T, next_TxV


def _struck(Q_V, tried, fallback_over_all):
    Q_V = Q_V.copy()
    Q_V[tried] = 0
    if Q_V.sum() == 0:
        Q_V = np.ones(len(Q_V))
        if not fallback_over_all:
            Q_V[tried] = 0
    return _share(Q_V, Q_V)


def _children(draft, v):
    return [c for c in draft.child_TxC[v] if c >= 0 and draft.valid_T[c]]


def recursive(draft, logp_TxV, replacement=False, masked=True, fallback_over_all=False):
    """Recursive rejection sampling.

    masked: a tried token leaves Q. fallback_over_all: where Q is used up, it becomes uniform over
    the tried tokens too.
    """
    p_TxV, q_TxV, stop_T, next_TxV = _read(draft, logp_TxV)

    def visit(v, mass):
        P_V, Q_V, tried = p_TxV[v], q_TxV[v], []
        for c in _children(draft, v):
            x = draft.tokens_T[c]
            accept = min(1.0, P_V[x] / Q_V[x]) if Q_V[x] else float(P_V[x] > 0)
            visit(c, mass * accept)
            mass *= 1 - accept
            P_V = _share(np.maximum(P_V - Q_V, 0), P_V)
            tried.append(x)
            if masked and not replacement:
                Q_V = _struck(Q_V, tried, fallback_over_all)
        stop_T[v], next_TxV[v] = mass, P_V

    visit(0, 1.0)
    return stop_T, next_TxV


def traversal(draft, logp_TxV, replacement=False, divided_by_unseen=False):
    """Traversal verification.

    divided_by_unseen: r <- min(Z/(1 - q_x), 1), as a re-implementation has it.
    """
    p_TxV, q_TxV, stop_T, next_TxV = _read(draft, logp_TxV)

    def visit(v, r, mass):
        P_V, Q_V, tried = p_TxV[v], q_TxV[v], []
        for c in _children(draft, v):
            x = draft.tokens_T[c]
            entered = min(1.0, r * P_V[x] / Q_V[x]) if Q_V[x] else float(r * P_V[x] > 0)
            mass = visit(c, entered, mass)
            left_V = np.maximum(r * P_V - Q_V, 0)
            Z = left_V.sum()
            if divided_by_unseen:
                r = min(1.0, Z / (1 - Q_V[x])) if Q_V[x] < 1 else 1.0
            else:
                r = Z / (Z + (1 - r)) if Z + (1 - r) > 0 else 1.0
            P_V = _share(left_V, P_V)
            tried.append(x)
            if not replacement:
                Q_V = _struck(Q_V, tried, False)
        r = r if v else 1.0
        stop_T[v], next_TxV[v] = mass * r, P_V
        return mass * (1 - r)

    visit(0, 1.0, 1.0)
    return stop_T, next_TxV


def longest_chain(draft, logp_TxV, chains, depth):
    """`chains` chains below one root, each verified by `token` alone; the longest result wins."""
    stop_T, next_TxV = np.zeros(len(logp_TxV)), np.zeros_like(logp_TxV)
    rows = [np.array([0, *range(1 + j * depth, 1 + (j + 1) * depth)]) for j in range(chains)]
    laws = []
    for r in rows:
        one = draft.replace(tokens_T=draft.tokens_T[r], law_TxV=draft.law_TxV[r])
        laws.append(token(one, logp_TxV[r]))
    for ends in np.ndindex(*[depth + 1] * chains):
        j = int(np.argmax(ends))  # the first of the longest
        v = rows[j][ends[j]]
        weight = np.prod([law[0][e] for law, e in zip(laws, ends, strict=True)])
        next_TxV[v] += weight * laws[j][1][ends[j]]
        stop_T[v] += weight
    return stop_T, next_TxV / np.maximum(stop_T, 1e-300)[:, None]
