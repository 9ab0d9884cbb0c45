"""Sample-and-match: its law by enumeration, its sampler by chi-square, both against slow twins."""

import functools
import itertools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from toys import toy_target

from specjax.drafters import Vanilla
from specjax.sampling import Sampling
from specjax.trees import DraftTree, backbone, chain
from specjax.verification import get_rule, make_noise, rule_names
from specjax.verification.base import LogitRows
from specjax.verification.match import Greedy, Match, walk

ROWS = 9  # every tree is padded to this many rows; what is not used is invalid


# ---- trees ---------------------------------------------------------------------------------------


def make_tree(rng, parents, vocab):
    """Random distinct sibling tokens, junk in the invalid rows: plain NumPy fields."""
    tokens = rng.integers(vocab, size=ROWS)
    for node in set(parents[1:]):
        children = [i for i, p in enumerate(parents) if p == node]
        tokens[children] = rng.permutation(vocab)[: len(children)]
    valid = np.arange(ROWS) < len(parents)
    junk = rng.integers(0, len(parents), ROWS - len(parents))  # claims a real parent, real tokens
    parents = np.array([*parents, *junk])
    depth = np.zeros(ROWS, int)
    for i in range(1, ROWS):
        depth[i] = depth[parents[i]] + 1
    return dict(tokens_T=tokens, parent_T=parents, valid_T=valid, depth_T=depth)


def random_parents(rng, depth, vocab):
    """Between 2 and ROWS - 2 rows, at most `depth` deep, at most `vocab` siblings."""
    parents, level = [-1], [0]
    for _ in range(rng.integers(1, ROWS - 2)):
        open_rows = [
            i for i in range(len(parents)) if level[i] < depth and parents.count(i) < vocab
        ]
        if not open_rows:
            break
        parents.append(int(rng.choice(open_rows)))
        level.append(level[parents[-1]] + 1)
    return parents


def some_trees(rng, depth, vocab):
    """A chain, a backbone tree, random trees and one whose inner node (with its subtree) is off."""
    width = min(vocab, 2 if depth == 3 else 3)
    shapes = [chain(depth).parents, backbone(depth, width).parents]
    shapes += [random_parents(rng, depth, vocab) for _ in range(3)]
    trees = [make_tree(rng, list(shape), vocab) for shape in shapes]
    trees.append({k: v.copy() for k, v in trees[1].items()})
    off = [1]
    for i in range(2, ROWS):
        if trees[-1]["parent_T"][i] in off:
            off.append(i)
    trees[-1]["valid_T"][off] = False
    return trees


def device(trees) -> DraftTree:
    """Stacked DraftTrees; the child table is not what matching reads, so it holds junk."""
    fields = {k: jnp.asarray(np.stack([t[k] for t in trees])) for k in trees[0]}
    fields = {k: v if v.dtype == bool else v.astype(jnp.int32) for k, v in fields.items()}
    return DraftTree(child_TxC=jnp.zeros((len(trees), ROWS, 1), jnp.int32), **fields)


@pytest.fixture(scope="module", params=[(3, 1), (5, 1), (3, 2), (5, 2), (4, 3)], ids=str)
def case(request):
    """(vocab, depth, trees, all draws, the library's walk on every pair of them)."""
    vocab, depth = request.param
    rng = np.random.default_rng(vocab * 10 + depth)
    trees = some_trees(rng, depth, vocab)
    draws = np.array(list(itertools.product(range(vocab), repeat=depth + 1)), np.int32)
    outs = run_walk(walk, trees, draws, depth)
    return vocab, depth, trees, draws, outs


def run_walk(walk, trees, draws, depth):
    """(path, tokens, count, node visited at each depth) for every tree and every row of draws."""

    def one(tree, draws_A):
        visited = []

        def token_at(d, node):
            visited.append(node)
            return draws_A[d]

        out = walk(token_at, tree, depth)
        return out.path_D, out.tokens_A, out.count, jnp.stack(visited)

    mapped = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    return [np.asarray(x) for x in mapped(device(trees), jnp.asarray(draws))]


# ---- the law -------------------------------------------------------------------------------------


def law_of_outcomes(table, tree, draws, tokens, count, visited, vocab, depth):
    """J: the law of depth + 1 tokens when every emission is completed by the target.

    The noise is enumerated: the draw at depth d has the target's law at the node the walk visited.
    """
    total = np.zeros((vocab,) * (depth + 1))
    parents, drafted = tree["parent_T"], tree["tokens_T"]
    paths = [laws.node_path(parents, drafted, node) for node in range(ROWS)]
    for y, emitted, n, nodes in zip(draws, tokens, count, visited, strict=True):
        weight = np.prod([table[paths[v]][t] for v, t in zip(nodes, y, strict=True)])
        if weight > 0:
            prefix = tuple(int(t) for t in emitted[:n])
            total[prefix] += weight * laws.joint(table, vocab, depth + 1, prefix)
    return total


def distances(case, outs):
    """Total variation from the target's joint law, one per tree, for fresh random tables."""
    vocab, depth, trees, draws, _ = case
    rng = np.random.default_rng(1)
    out = []
    for tree, tokens, count, visited in zip(trees, *outs[1:], strict=True):
        table = laws.random_table(rng, vocab, depth + 1)
        law = law_of_outcomes(table, tree, draws, tokens, count, visited, vocab, depth)
        out.append(laws.total_variation(law, laws.joint(table, vocab, depth + 1)))
    return out


def test_law_is_the_target_s_own(case):
    assert max(distances(case, case[-1])) <= 1e-12


def test_walk_equals_a_plain_python_walk_on_the_same_draws(case):
    _, depth, trees, draws, (paths, tokens, counts, _) = case
    for i, tree in enumerate(trees):
        fields = tree["parent_T"], tree["tokens_T"], tree["valid_T"]
        for j, y in enumerate(draws):
            path, emitted = laws.slow_walk(*fields, lambda d, _, y=y: y[d])
            assert counts[i, j] == len(emitted)
            assert paths[i, j].tolist() == path + [-1] * (depth - len(path))
            assert tokens[i, j].tolist() == emitted + [-1] * (depth + 1 - len(emitted))


def test_structure_of_every_outcome(case):
    _, depth, trees, _, (paths, tokens, counts, _) = case
    assert counts.min() == 1 and counts.max() == depth + 1  # the cases cover both ends
    for i, tree in enumerate(trees):
        for path, emitted, count in zip(paths[i], tokens[i], counts[i], strict=True):
            accepted = path[: count - 1]
            assert (accepted > 0).all() and (path[count - 1 :] == -1).all()
            assert (emitted[:count] >= 0).all() and (emitted[count:] == -1).all()
            assert (tree["parent_T"][accepted] == [0, *accepted][: count - 1]).all()  # a root path
            assert (tree["tokens_T"][accepted] == emitted[: count - 1]).all()
            assert tree["valid_T"][accepted].all()
            assert (tree["depth_T"][accepted] == np.arange(1, count)).all()


# ---- planted bugs: the law must move -------------------------------------------------------------


def walk_any_parent(token_at, draft, depth):
    """`walk` that looks for the token anywhere at the next depth."""
    node, alive, path, tokens, count = jnp.int32(0), jnp.bool_(True), [], [], jnp.int32(0)
    for d in range(depth + 1):
        token = token_at(d, node)
        tokens.append(jnp.where(alive, token, -1))
        count = count + alive
        if d < depth:
            match_T = (draft.depth_T == d + 1) & (draft.tokens_T == token) & draft.valid_T
            alive = alive & jnp.any(match_T)
            node = jnp.where(alive, jnp.argmax(match_T), node)
            path.append(jnp.where(alive, node, -1))
    return type(walk(lambda d, n: 0, draft, 0))(jnp.stack(path), jnp.stack(tokens), count)


def test_planted_bug_child_of_another_parent_is_caught():
    rng = np.random.default_rng(2)
    vocab, depth = 3, 2
    trees = [make_tree(rng, [-1, 0, 0, 1, 1, 2], vocab) for _ in range(6)]
    draws = np.array(list(itertools.product(range(vocab), repeat=depth + 1)), np.int32)
    case = (vocab, depth, trees, draws, None)
    assert max(distances(case, run_walk(walk, trees, draws, depth))) <= 1e-12
    assert max(distances(case, run_walk(walk_any_parent, trees, draws, depth))) > 1e-2


def law_with_one_uniform(table, vocab, depth, tree):
    """J when all depths share one uniform number: integrated exactly between its breakpoints."""
    fields = tree["parent_T"], tree["tokens_T"], tree["valid_T"]
    cdf = {v: np.cumsum(table[laws.node_path(*fields[:2], v)]) for v in range(ROWS) if fields[2][v]}
    edges = np.unique(np.concatenate([[0.0, 1.0], *cdf.values()]).clip(0, 1))
    total = np.zeros((vocab,) * (depth + 1))
    for low, high in itertools.pairwise(edges):
        u = (low + high) / 2
        pick = lambda d, v, u=u: min(np.searchsorted(cdf[v], u, side="right"), vocab - 1)  # noqa: E731
        _, emitted = laws.slow_walk(*fields, pick)
        prefix = tuple(emitted)
        total[prefix] += (high - low) * laws.joint(table, vocab, depth + 1, prefix)
    return total


def test_planted_bug_one_noise_for_all_depths_is_caught(case):
    vocab, depth, trees, _, _ = case
    rng = np.random.default_rng(3)
    worst = 0.0
    for tree in trees:
        table = laws.random_table(rng, vocab, depth + 1, zeros=0.0)
        law = law_with_one_uniform(table, vocab, depth, tree)
        worst = max(worst, laws.total_variation(law, laws.joint(table, vocab, depth + 1)))
    assert worst > 1e-2


# ---- the sampler ---------------------------------------------------------------------------------

SAMPLINGS = [Sampling(t, *f) for t in (0.6, 1.0, 1.3) for f in ((0, 1.0), (4, 0.92))]
KEYS = 24_000
VOCAB, DEPTH = 6, 2


@pytest.fixture(scope="module")
def peaked():
    """(tree, logits): a tree that is often followed and logits that are peaked."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(ROWS, VOCAB)) * 1.4
    tree = make_tree(rng, [-1, 0, 0, 1, 1, 1, 2], VOCAB)
    for node, children in {0: [1, 2], 1: [3, 4, 5], 2: [6]}.items():
        # The likeliest token but one: often followed, and often not, whatever the filter keeps.
        tree["tokens_T"][children] = np.argsort(-logits[node])[[0, 2, 3][: len(children)]]
    return tree, logits.astype(np.float32)


def sampled(rule, peaked, sampling):
    """{emitted tokens: count} of rule.verify over KEYS keys."""
    tree, logits = peaked
    draft = jax.tree.map(lambda x: x[0], device([tree]))

    @jax.jit
    def run(keys):
        rows = LogitRows(logits, sampling)
        return jax.vmap(lambda k: rule.verify(make_noise(k, ROWS, DEPTH), draft, rows))(keys)

    logits = jnp.asarray(logits)
    out = jax.device_get(run(jax.random.split(jax.random.key(7), KEYS)))
    emitted, counts = np.unique(out.tokens_A, axis=0, return_counts=True)
    return {
        tuple(t for t in row.tolist() if t >= 0): int(n)
        for row, n in zip(emitted, counts, strict=True)
    }


def exact(peaked, sampling):
    """The same, as probabilities."""
    tree, logits = peaked
    fields = tree["parent_T"], tree["tokens_T"], tree["valid_T"]
    return laws.emissions(*fields, lambda node: laws.filtered(logits[node], sampling))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sampler_follows_the_law(peaked, sampling):
    counts, law = sampled(Match(), peaked, sampling), exact(peaked, sampling)
    assert sum(law.values()) == pytest.approx(1)
    assert {len(e) for e in counts} == {1, 2, 3}  # every acceptance length occurs
    assert laws.chi_square(counts, law) > 1e-3 / len(SAMPLINGS)


class OneNoise(Match):
    """Planted bug: one uniform number for all depths."""

    def verify(self, noise, draft, rows, force_T=None):
        return walk(lambda d, row: rows.token(row, noise.token_A[0]), draft, DEPTH)


class RawExtra(Match):
    """Planted bug: a leaf's token (always the extra one) skips top-k and top-p."""

    def verify(self, noise, draft, rows, force_T=None):
        raw = LogitRows(rows.logits_TxV, Sampling(rows.sampling.temperature))

        def token_at(d, row):
            uniform = noise.token_A[d]
            leaf = ~jnp.any((draft.parent_T == row) & draft.valid_T)
            return jnp.where(leaf, raw.token(row, uniform), rows.token(row, uniform))

        return walk(token_at, draft, DEPTH)


@pytest.mark.parametrize(
    "rule, sampling", [(OneNoise(), Sampling(1.0)), (RawExtra(), Sampling(1.0, 4, 0.92))], ids=repr
)
def test_planted_sampler_bugs_are_caught(peaked, rule, sampling):
    assert laws.chi_square(sampled(rule, peaked, sampling), exact(peaked, sampling)) < 1e-6


# ---- verify on batches ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    """16 different trees of depth 3 with logits and keys."""
    rng = np.random.default_rng(5)
    trees = [make_tree(rng, random_parents(rng, 3, VOCAB), VOCAB) for _ in range(16)]
    logits = rng.normal(size=(16, ROWS, VOCAB)).astype(np.float32) * 2
    for tree, rows in zip(trees, logits, strict=True):  # the first children often match
        for node in range(ROWS):
            children = np.flatnonzero((tree["parent_T"] == node) & tree["valid_T"])
            if len(children):
                rows[node, tree["tokens_T"][children[-1]]] += 3
    return trees, logits, jax.random.split(jax.random.key(8), 16)


def verified(rule, sampling, keys, trees, logits):
    """The rule on a batch of trees of depth 3, one key a tree."""
    return jax.device_get(run_batch(rule, sampling, keys, device(trees), jnp.asarray(logits)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_batch(rule, sampling, keys, trees, logits):
    def one(key, tree, logits_TxV):
        return rule.verify(make_noise(key, ROWS, 3), tree, LogitRows(logits_TxV, sampling))

    return jax.vmap(one)(keys, trees, logits)


@pytest.mark.parametrize("rule", [Greedy(), Match()], ids=repr)
def test_greedy_follows_the_argmax(batch, rule):
    trees, logits, keys = batch
    out = verified(rule, Sampling(), keys, trees, logits)
    assert out.count.max() > 2
    for i, tree in enumerate(trees):
        fields = tree["parent_T"], tree["tokens_T"], tree["valid_T"]
        path, emitted = laws.slow_walk(*fields, lambda d, node, i=i: logits[i, node].argmax())
        assert out.count[i] == len(emitted)
        assert out.tokens_A[i, : len(emitted)].tolist() == emitted
        assert out.path_D[i, : len(path)].tolist() == path


def test_rows_of_a_batch_do_not_touch_each_other(batch):
    trees, logits, keys = batch
    sampling = Sampling(0.9, 5, 0.95)
    whole = verified(Match(), sampling, keys, trees, logits)
    assert len(set(whole.count.tolist())) > 2
    order = np.array([3, 3, 15, 0, 7, 9, 1, 2, 14, 13, 5, 5, 5, 8, 11, 4])  # permuted, repeated
    shuffled = [trees[i] for i in order]
    part = verified(Match(), sampling, keys[order], shuffled, logits[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), whole, part)
    for i in range(16):  # nothing with probability zero is ever emitted
        rows = [0, *whole.path_D[i][whole.path_D[i] >= 0]]
        for row, token in zip(rows, whole.tokens_A[i], strict=False):
            assert laws.filtered(logits[i, row], sampling)[token] > 0


# ---- rules by name -------------------------------------------------------------------------------


def test_rule_names_and_get_rule():
    assert {"greedy", "match"} <= set(rule_names())
    for name in rule_names():
        rule = get_rule(name)
        assert rule.name == name and isinstance(rule.exact, bool)
        assert rule == get_rule(name) and hash(rule) == hash(get_rule(name))
    assert get_rule("match").exact and get_rule("greedy").exact


def test_unknown_rules_and_parameters_are_named():
    with pytest.raises(ValueError, match="'mtach'.*greedy"):
        get_rule("mtach")
    with pytest.raises(ValueError, match="'match'.*window"):
        get_rule("match", window=3)


def test_greedy_refuses_a_temperature():
    drafter = Vanilla(toy_target().config)
    with pytest.raises(ValueError, match="greedy.*0.7.*match"):
        Greedy().check(Sampling(0.7), drafter)
    Greedy().check(Sampling(), drafter)
    Match().check(Sampling(0.7), drafter)
