"""Every exact rule, by enumeration: the emitted law is the target's own to 1e-12."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import proofs
import pytest

from specjax.drafters.proposals import beam_step, draw_children
from specjax.trees import Topology, backbone, chain, chains, paths
from specjax.verification import get_rule, law, rule_names

SIZES = [(3, 1), (5, 1), (3, 2), (4, 2), (3, 3)]  # (vocabulary, depth)
EXACT = 1e-12


def bushy(depth):
    """Two children, then uneven ones."""
    inner = {1: [], 2: [(0, 0), (0, 1), (1, 0)], 3: [(0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0)]}
    return paths([(0,), (1,), *inner[depth]])


def wide(depth):
    """Three children below the root, then the second one goes on."""
    return paths([(0,), (1,), (2,), (1,) + (0,) * (depth - 1)])


def trees(vocab, depth):
    """Shapes with several children a node, as far as they can be enumerated."""
    shapes = [backbone(depth, 2), backbone(depth, 3), bushy(depth), wide(depth), chains(2, depth)]
    return [s for s in dict.fromkeys(shapes) if proofs.size(s, vocab) <= proofs.MOST_DRAFTS]


def truncations(topology):
    """valid_T with the last rows off: what is left of a draft whose tail was never drawn."""
    rows = np.arange(topology.nodes)
    return [rows < n for n in {1, 2, topology.nodes - 1} if n < topology.nodes]


def worst(rule, shapes, vocab, kinds, seed):
    """The largest distance over shapes, kinds of drawing, zeros or none."""
    rng, distances = np.random.default_rng(seed), []
    for shape in shapes:
        for kind in kinds:
            for zeros in (0.0, 0.35):
                case = proofs.random_case(rng, shape, vocab, kind, zeros)
                distances.append(proofs.distance(case, rule))
    return max(distances)


# ---- rules that read the draft's law -------------------------------------------------------------


@pytest.mark.parametrize("vocab, depth", [*SIZES, (4, 3)])
@pytest.mark.parametrize("name", ["token", "block", "recursive_rejection", "traversal", "k_seq"])
def test_chains(name, vocab, depth):
    kinds = ["chains"] if name == "k_seq" else ["without_replacement", "with_replacement", "top"]
    assert worst(get_rule(name), [chain(depth)], vocab, kinds, depth) <= EXACT


@pytest.mark.parametrize("name", ["token", "block", "recursive_rejection", "traversal", "k_seq"])
def test_chains_cut_short(name):
    rng = np.random.default_rng(0)
    for depth in (1, 2, 3):
        for length in range(depth):
            valid = np.arange(depth + 1) <= length
            for kind in ("chains",) if name == "k_seq" else ("chains", "top"):
                for zeros in (0.0, 0.35):
                    case = proofs.random_case(rng, chain(depth), 3, kind, zeros, valid)
                    proof = proofs.prove(case, get_rule(name))
                    assert proof.distance <= EXACT
                    assert zeros or (proof.accepted > 0) == (length > 0)


@pytest.mark.parametrize("vocab, depth", SIZES)
@pytest.mark.parametrize("name", ["recursive_rejection", "traversal"])
@pytest.mark.parametrize("replacement", [False, True])
def test_sampled_trees(name, replacement, vocab, depth):
    rule = get_rule(name, replacement=replacement)
    assert worst(rule, trees(vocab, depth), vocab, [rule.draws], 10 * vocab + depth) <= EXACT


@pytest.mark.parametrize("vocab, depth", SIZES)
@pytest.mark.parametrize("name", ["match", "recursive_rejection", "traversal"])
def test_deterministic_trees(name, vocab, depth):
    shapes = [*trees(vocab, depth), chain(depth), backbone(depth, vocab)]
    assert worst(get_rule(name), shapes, vocab, ["top"], depth) <= EXACT


@pytest.mark.parametrize("vocab, depth", SIZES)
def test_match_on_sampled_trees(vocab, depth):
    shapes = trees(vocab, depth)
    assert worst(get_rule("match"), shapes, vocab, ["without_replacement"], vocab) <= EXACT


@pytest.mark.parametrize("name", ["match", "recursive_rejection", "traversal"])
def test_trees_cut_short(name):
    rng = np.random.default_rng(1)
    for shape in (backbone(2, 2), bushy(2), wide(2)):
        for valid in truncations(shape):
            for kind in ("without_replacement", "top"):
                case = proofs.random_case(rng, shape, 3, kind, valid=valid)
                assert proofs.distance(case, get_rule(name)) <= EXACT
            if name != "match":
                case = proofs.random_case(rng, shape, 3, "with_replacement", valid=valid)
                assert proofs.distance(case, get_rule(name, replacement=True)) <= EXACT


@pytest.mark.parametrize(
    "count, depth, vocab",
    [(1, 3, 4), (2, 1, 5), (2, 2, 3), (2, 2, 4), (3, 1, 4), (3, 1, 5), (3, 2, 3), (2, 3, 3)],
)
def test_k_seq(count, depth, vocab):
    shape = chains(count, depth)
    assert proofs.size(shape, vocab) <= proofs.MOST_DRAFTS
    assert worst(get_rule("k_seq"), [shape], vocab, ["chains"], count) <= EXACT


def test_k_seq_with_chains_of_unequal_lengths():
    rng = np.random.default_rng(2)
    for off in ([2], [4], [3, 4], [2, 3, 4], [1, 2], [1, 2, 3, 4]):
        valid = ~np.isin(np.arange(5), off)
        case = proofs.random_case(rng, chains(2, 2), 3, "chains", valid=valid)
        assert proofs.distance(case, get_rule("k_seq")) <= EXACT


def test_greedy_is_the_limit_of_low_temperatures():
    rng = np.random.default_rng(3)
    for shape in (chain(2), backbone(2, 3), bushy(2)):
        case = proofs.random_case(rng, shape, 4, "top")
        sharp = {x: np.eye(4)[p.argmax()] for x, p in case.p.items()}
        emit = lambda d, logp: law(d, logp, get_rule("greedy"))  # noqa: E731
        assert proofs.distance(proofs.Case(shape, 4, "top", sharp, case.q), emit=emit) == 0
        for draft, logp_TxV, _ in proofs.drafts(case):
            cold = np.where(np.isneginf(logp_TxV), -np.inf, logp_TxV * 2e3)
            cold -= np.logaddexp.reduce(cold, axis=1, keepdims=True)
            hot, limit = emit(draft, logp_TxV), law(draft, cold, get_rule("match"))
            np.testing.assert_allclose(hot[0], limit[0], atol=1e-3)
            np.testing.assert_allclose(hot[1], limit[1], atol=1e-3)


def test_every_rule_that_calls_itself_exact_is_proven_here():
    proven = {"greedy", "match", "token", "block", "recursive_rejection", "traversal", "k_seq"}
    assert {name for name in rule_names() if get_rule(name).exact} == proven


# ---- drawing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["without_replacement", "with_replacement"])
@pytest.mark.parametrize(
    "q, count",
    [
        ([0.55, 0.25, 0.15, 0.05], 3),
        ([0.9, 0.0, 0.1, 0.0, 0.0], 4),  # two tokens to draw, then uniformly from three
        ([0.0, 1.0, 0.0, 0.0], 2),
        ([0.2, 0.3, 0.5], 3),
    ],
)
def test_draw_children_follows_drawing_one_after_another(q, count, kind):
    q_V, keys = np.array(q), jax.random.split(jax.random.key(len(q) + count), 100_000)
    logq_V = jnp.log(jnp.asarray(q_V, jnp.float32))
    drawn = jax.jit(jax.vmap(lambda key: draw_children(key, logq_V, count, kind)))(keys)
    rows, counts = np.unique(drawn, axis=0, return_counts=True)
    observed = {tuple(r): int(n) for r, n in zip(rows.tolist(), counts, strict=True)}
    expected = dict(proofs.sibling_draws(q_V, count, kind))
    if len(expected) == 1:
        assert set(observed) == set(expected)
    else:
        assert laws.chi_square(observed, expected) > 1e-4


# ---- stochastic beam search (RSD-S) --------------------------------------------------------------

DRAFTS, VOCAB, DEPTH = 400_000, 4, 2


def beam_drafts(q, width, seed):
    """Distinct RSD-S drafts among DRAFTS simulated ones: (tokens, parents, valid), counts."""
    order = sorted(q, key=lambda x: (len(x), x))  # prefix number n continues as n * V + 1 + token
    logq_PxV = jnp.log(jnp.asarray(np.array([q[x] for x in order]), jnp.float32))
    rows = 1 + width * DEPTH

    def one(key):
        phi = perturbed = jnp.zeros(1)
        at = row = jnp.zeros(1, jnp.int32)
        tokens, parents, valid = [row], [row - 1], [row == 0]
        for level in range(DEPTH):
            token, beam, phi, perturbed = beam_step(
                jax.random.fold_in(key, level), phi, perturbed, logq_PxV[at], width
            )
            tokens.append(token)
            parents.append(row[beam])
            valid.append(jnp.isfinite(perturbed))
            at, row = at[beam] * VOCAB + 1 + token, 1 + level * width + jnp.arange(width)
        return jnp.stack([jnp.concatenate(x).astype(jnp.int8) for x in (tokens, parents, valid)])

    drawn = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), DRAFTS))
    packed = np.ascontiguousarray(drawn).reshape(DRAFTS, -1)
    distinct, counts = np.unique(packed.view(f"V{packed.shape[1]}")[:, 0], return_counts=True)
    return np.frombuffer(distinct.tobytes(), np.int8).reshape(-1, 3, rows).astype(int), counts


@pytest.mark.parametrize("width, zeros", [(2, 0.0), (3, 0.35)])
def test_stochastic_beam_trees(width, zeros):
    rng = np.random.default_rng(4)
    case = proofs.random_case(rng, chain(DEPTH), VOCAB, "without_replacement", zeros)
    if zeros:  # fewer tokens than beams: some die
        case.q[()] = np.array([0.7, 0.3, 0.0, 0.0])
    simulated, counts = beam_drafts({x: q for x, q in case.q.items() if len(x) < DEPTH}, width, 0)
    assert (simulated[:, 2].min() == 0) == (zeros > 0)
    for name in ("recursive_rejection", "traversal"):
        observed = np.zeros((VOCAB,) * (DEPTH + 1), int)
        for (tokens, parents, valid), count in zip(simulated, counts, strict=True):
            topology = Topology(tuple(parents.tolist()))
            one = dataclasses.replace(case, topology=topology, valid=valid > 0)
            draft, logp_TxV = one.draft(tokens)
            completed = proofs.completed(case.p, VOCAB, DEPTH + 1, [
                (one.prefixes(tokens), 1.0, *law(draft, logp_TxV, get_rule(name)))
            ])  # fmt: skip
            cells = completed.ravel() / completed.sum()
            observed += rng.multinomial(count, cells).reshape(completed.shape)
        joint = laws.joint(case.p, VOCAB, DEPTH + 1)
        expected = {x: float(p) for x, p in np.ndenumerate(joint) if p > 0}
        seen = {x: int(n) for x, n in np.ndenumerate(observed) if n}
        assert laws.chi_square(seen, expected) > 1e-4
