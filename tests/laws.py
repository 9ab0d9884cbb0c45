"""Laws computed the slow way, in float64 NumPy, and the one statistical test that uses them.

Written from the definitions, not from the library: this is what the library is held against.
"""

import itertools

import numpy as np
from scipy.stats import chi2


def filtered(logits, sampling):
    """Temperature, top-k, top-p by sorting; tokens tied with the last one kept stay."""
    logits = np.asarray(logits, np.float64)
    scaled = logits / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled = np.where(scaled >= np.sort(scaled)[-sampling.top_k], scaled, -np.inf)
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    if sampling.top_p < 1:
        ordered = np.sort(probs)[::-1]
        last = ordered[np.searchsorted(np.cumsum(ordered), sampling.top_p)]
        probs = np.where(probs >= last, probs, 0)
        probs /= probs.sum()
    return probs


def random_table(rng, vocab, length, zeros=0.3):
    """Conditional laws of a toy model: table[prefix] for every prefix shorter than `length`."""
    table = {}
    for n in range(length):
        for prefix in itertools.product(range(vocab), repeat=n):
            p = rng.dirichlet(np.full(vocab, 0.7)) * (rng.random(vocab) >= zeros)
            if p.sum() == 0:
                p = np.eye(vocab)[rng.integers(vocab)]
            table[prefix] = p / p.sum()
    return table


def joint(table, vocab, length, prefix=()):
    """The law of whole sequences after `prefix`: one axis for each token still to come."""
    if len(prefix) == length:
        return np.ones(())
    after = [joint(table, vocab, length, (*prefix, t)) for t in range(vocab)]
    return np.stack([p * law for p, law in zip(table[prefix], after, strict=True)])


def total_variation(p, q):
    """Half the L1 distance."""
    return 0.5 * np.abs(p - q).sum()


def node_path(parents, tokens, node):
    """Tokens from below the root down to `node`."""
    path = []
    while node > 0:
        path.append(int(tokens[node]))
        node = parents[node]
    return tuple(reversed(path))


def slow_walk(parents, tokens, valid, token_at):
    """(path, emitted tokens): follow, from the root, the valid child that carries the token."""
    node, path, emitted = 0, [], []
    while True:
        token = int(token_at(len(path), node))
        emitted.append(token)
        children = [i for i in range(1, len(parents)) if parents[i] == node and valid[i]]
        matching = [i for i in children if tokens[i] == token]
        if not matching:
            return path, emitted
        (node,) = matching  # siblings are distinct
        path.append(node)


def emissions(parents, tokens, valid, law_of):
    """{emitted tokens: probability} of sample-and-match; law_of(node) is a law over tokens."""
    out = {}

    def visit(node, prefix, mass):
        children = {tokens[i]: i for i in range(1, len(parents)) if parents[i] == node and valid[i]}
        for token, p in enumerate(law_of(node)):
            if p > 0 and token in children:
                visit(children[token], (*prefix, token), mass * p)
            elif p > 0:
                out[(*prefix, token)] = mass * p

    visit(0, (), 1.0)
    return out


def chi_square(counts, expected):
    """p-value that `counts` ({outcome: count}) follow `expected` ({outcome: probability}).

    Outcomes expected fewer than five times share one cell; an impossible outcome gives 0.
    """
    total = sum(counts.values())
    if any(expected.get(outcome, 0.0) <= 0 for outcome in counts):
        return 0.0
    cells, rare = [], [0.0, 0.0]
    for outcome, p in expected.items():
        cell = (counts.get(outcome, 0), total * p)
        if cell[1] >= 5:
            cells.append(cell)
        else:
            rare = [rare[0] + cell[0], rare[1] + cell[1]]
    if rare[1] >= 5:
        cells.append(tuple(rare))
    elif rare[1] > 0:  # too small for a cell of its own: into the smallest one
        cells.sort(key=lambda c: c[1])
        cells[0] = (cells[0][0] + rare[0], cells[0][1] + rare[1])
    observed, mean = np.array(cells, np.float64).T
    if len(mean) < 2:
        raise ValueError("one cell: the sample is too small to test anything")
    return float(chi2.sf(((observed - mean) ** 2 / mean).sum(), len(mean) - 1))
