"""Retrieval and a drafter together are never worse than either, and training sees the drafter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import PROMPTS, greedy_continuations, run_recording, toy_target

import specjax
from configs import common
from specjax.drafters import Context, FastEagle, Rasd
from specjax.drafters.rasd import fused
from specjax.generation import make_engine, start
from specjax.training.objective import drafter_loss, make_objective
from specjax.training.online import OnlineTrainer

NEW = 24
INNER = dict(num_layers=2, candidates=3)


@pytest.fixture(scope="module")
def target():
    return toy_target()


@pytest.fixture(scope="module")
def truth(target):
    return greedy_continuations(target, PROMPTS, NEW + 12)


@pytest.fixture(scope="module")
def inner(target):
    return specjax.init_drafter("fasteagle", target, seed=1, **INNER)


def paths(tree, b):
    """Token paths of request b's valid rows."""
    path = [()]
    for i, p in enumerate(tree.parent_T[b].tolist()[1:], start=1):
        path.append((*path[p], int(tree.tokens_T[b, i])))
    return {p for p, valid in zip(path, tree.valid_T[b].tolist(), strict=True) if valid and p}


def drafts(engine, params, target, record):
    """The trees that a drafter would draft from recorded states."""
    draft = jax.jit(engine.drafter.draft)
    return [
        draft(
            params["drafter"], target.params, s.drafter,
            Context(jnp.asarray(s.tokens_BxS), jnp.asarray(s.lengths_B)), None,
        )[0]
        for s in record
    ]  # fmt: skip


def rounds(target, drafter):
    """(record of a greedy run, the tree of each round)."""
    engine, params = make_engine(target, drafter, stop_tokens=())
    _, record = run_recording(engine, params, start(engine, params, PROMPTS, NEW))
    return record, drafts(engine, params, target, record)


@pytest.fixture(scope="module")
def three(target, inner):
    """One run with the fusion; per round the trees of the fusion, of either part, and pruned.

    The corpus is half of what the target writes, shifted, so that it is right now and then.
    """
    texts = greedy_continuations(target, [[7], [3, 1], [4, 4]], 20)
    settings = dict(
        min_suffix=1, hits=3, continuation=4, retrieved_nodes=30, max_suffix=3,
    )  # fmt: skip
    both = fused(inner, texts, prune=False, **settings)
    record, trees = rounds(target, both)
    parts = [fused(specjax.init_drafter("rasd", target), texts, **settings), inner]
    parts.append(fused(inner, texts, prune_top=3, **settings))
    found = []
    for part in parts:
        engine, params = make_engine(target, part, stop_tokens=())
        found.append(drafts(engine, params, target, record))
    return record, trees, *found


def each_round(three):
    """(state, request, sets of paths of fusion, retrieval, inner tree, pruned fusion)."""
    for state, *trees in zip(*three, strict=True):
        for b in range(len(PROMPTS)):
            yield state, b, *(paths(tree, b) for tree in trees)


def test_the_fusion_drafts_what_both_draft(three):
    """Word for word, every round: budgets have room for everything."""
    new = 0
    for _, _, fusion, retrieved, tree, _ in each_round(three):
        assert fusion == retrieved | tree
        new += len(retrieved - tree)
    assert new > 50


def test_the_fusion_accepts_as_much_as_the_better_of_both(three, truth):
    def accepted(path_set, rest):
        return max((len(p) for p in path_set if list(p) == rest[: len(p)]), default=0)

    better = {"retrieval": 0, "tree": 0}
    for state, b, fusion, retrieved, tree, _ in each_round(three):
        rest = truth[b][state.lengths_B[b] - state.prompts_B[b] :]
        ours, theirs, its = (accepted(x, rest) for x in (fusion, retrieved, tree))
        assert ours == max(theirs, its)
        better["retrieval"] += theirs > its
        better["tree"] += its > theirs
    assert min(better.values()) > 0


def test_pruning_keeps_what_starts_as_the_inner_tree_does(three):
    dropped = 0
    for _, _, _, retrieved, tree, pruned in each_round(three):
        expected = {p for p in retrieved if p[:1] in tree}
        assert pruned == tree | expected
        dropped += len(retrieved) - len(expected)
    assert dropped > 10


def test_a_chain_prunes_by_its_law_and_an_empty_draft_not_at_all(target, inner, three):
    """What stays does not depend on how many of the first tokens the inner tree tries itself."""
    record, settings = three[0], dict(min_suffix=1, hits=3, continuation=4, retrieved_nodes=30)
    chain = inner.with_budget(candidates=1)
    dropped, offered = 0, 0

    def drafted(drafter):
        engine, params = make_engine(target, drafter, stop_tokens=())
        return drafts(engine, params, target, record)

    free, pruned = (drafted(fused(chain, prune=p, prune_top=3, **settings)) for p in (False, True))
    first = drafted(inner)  # its best three
    for all_of_it, some, best in zip(free, pruned, first, strict=True):
        for b in range(len(PROMPTS)):
            expected = {p for p in paths(best, b) if len(p) == 1}
            kept = {p for p in paths(all_of_it, b) if p[:1] in expected}
            assert paths(some, b) == kept
            dropped += len(paths(all_of_it, b) - kept)
            offered += len({p[:1] for p in kept}) > 1
    assert dropped > 5 and offered > 5

    lookup = specjax.init_drafter("prompt_lookup", target, max_ngram=3, draft_depth=2)
    none = np.zeros_like(record[0].tokens_BxS)
    none[:, :8] = [1, 2, 3, 4, 5, 2, 3, 6]  # its last token is new: nothing to copy
    text = Context(jnp.asarray(none), jnp.full(len(PROMPTS), 8))
    around = fused(lookup, [[9, 6, 7, 8]], history=False, min_suffix=1)
    tree, _ = around.definition.draft(around.params, target.params, (), text, None)
    assert paths(tree, 0) == {(7,), (7, 8)}


def test_text_copied_from_the_corpus_is_drafted_whole(target, truth):
    documents = [p + t for p, t in zip(PROMPTS, truth, strict=True)]
    fresh = specjax.init_drafter("rasd", target)
    K = 5
    drafter = fused(
        fresh, documents, history=False, min_suffix=1, continuation=K, retrieved_nodes=8 * K
    )
    out = specjax.generate(target, PROMPTS, drafter, 1 + 4 * (K + 1), stop_tokens=())
    assert out.tokens == [t[: 1 + 4 * (K + 1)] for t in truth]
    assert out.accept_lengths == [[1] + [K + 1] * 4] * len(PROMPTS)


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_history_alone_goes_on_with_a_period(target, period):
    """As far as it may, from one occurrence on; what lies past the text is not read."""
    definition = Rasd(target.config, continuation=6, hits=1)
    text = np.arange(40) % period
    junk = np.random.default_rng(0).integers(12, size=40)
    lengths = np.array([16, 23])
    tokens = np.where(np.arange(40) < lengths[:, None], text, junk)
    context = Context(jnp.asarray(tokens), jnp.asarray(lengths))
    tree, _ = definition.draft({}, target.params, (), context, None)
    for b, n in enumerate(lengths):
        longest = text[n : n + 6].tolist()
        assert paths(tree, b) == {tuple(longest[:i]) for i in range(1, 7)}


def test_any_tree_is_fused(target, truth):
    """A dynamic tree as the inner one, deeper than what is retrieved."""
    options = dict(steps=3, top_k=2, total_nodes=6)
    drafter = specjax.init_drafter(
        "rasd", target, inner="eagle3", inner_options=options, continuation=2, retrieved_nodes=4
    )
    definition = drafter.definition
    assert (definition.nodes, definition.depth) == (10, 3)
    assert definition.scratch == definition.inner.scratch
    out = specjax.generate(target, PROMPTS, drafter, NEW, stop_tokens=())
    assert out.tokens == [t[:NEW] for t in truth]
    small = drafter.with_budget(retrieved_nodes=3, inner_options=dict(draft_depth=2))
    assert (small.definition.nodes, small.definition.depth) == (9, 2)
    out = specjax.generate(target, PROMPTS, small, NEW, stop_tokens=())
    assert out.tokens == [t[:NEW] for t in truth]


# ---- folders, constructors -----------------------------------------------------------------------


def test_corpus_and_inner_drafter_survive_the_folder(target, inner, tmp_path):
    drafter = fused(inner, PROMPTS, min_suffix=1)
    drafter.save(tmp_path)
    again = specjax.load_drafter(tmp_path, target)
    assert again.definition == drafter.definition and again.definition.inner == inner.definition
    jax.tree.map(np.testing.assert_array_equal, again.params, drafter.params)
    assert again.num_params == inner.num_params


def test_fusing_again_changes_settings_or_the_corpus(inner):
    once = fused(inner, PROMPTS, hits=3)
    again = fused(once, min_suffix=1)
    assert again.definition == dataclasses.replace(once.definition, min_suffix=1)
    assert again.params is once.params
    without = fused(once, [])
    assert without.definition == dataclasses.replace(once.definition, corpus_size=0)
    assert without.params.keys() == inner.params.keys()
    assert all(without.params[k] is v for k, v in inner.params.items())


def test_by_name_it_is_the_inner_drafter_and_retrieval(target, inner):
    drafter = specjax.init_drafter("rasd", target, 1, inner="fasteagle", inner_options=INNER)
    assert drafter.definition.inner == inner.definition
    jax.tree.map(np.testing.assert_array_equal, drafter.params, inner.params)
    words = [1, 4, 6]
    options = INNER | dict(draft_vocab_size=3)
    small = specjax.init_drafter(
        "rasd", target, vocab_ids=words, corpus_size=9, inner="fasteagle", inner_options=options
    )
    assert small.params["buffers"]["vocab_ids"].tolist() == words
    assert small.params["buffers"]["corpus"]["tokens"].shape == (9,)


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(min_suffix=0), "min_suffix"),
        (dict(min_suffix=5, max_suffix=4), "min_suffix"),
        (dict(hits=0), "hits"),
        (dict(continuation=0), "continuation"),
        (dict(retrieved_nodes=0), "retrieved_nodes"),
        (dict(prune_top=0), "prune_top"),
        (dict(history=False), "corpus_size"),
        (dict(total_nodes=1), "total_nodes.*2, 17"),
        (dict(total_nodes=18), "total_nodes"),
        (dict(inner="fasteagle", total_nodes=8), r"total_nodes: 8 must be 0 or in \[9, 24\]"),
        (dict(inner="faseagle"), "inner: 'faseagle'.*fasteagle"),
        (
            dict(inner="fasteagle", inner_options=dict(layres=1)),
            "'fasteagle' has no field 'layres'",
        ),
        (dict(inner_options=dict(layres=1)), "inner_options"),
        (dict(inner="rasd"), "nest"),
    ],
)
def test_bad_fields_are_named(target, fields, match):
    with pytest.raises(ValueError, match=match):
        specjax.init_drafter("rasd", target, **fields)


def test_what_does_not_fit_is_refused(target, inner):
    with pytest.raises(ValueError, match="inner: was made for another target"):
        Rasd(toy_target(num_layers=4).config, inner.definition)
    with pytest.raises(ValueError, match=r"documents\[1\].*12"):
        fused(inner, [[1, 2], [12]])
    with pytest.raises(ValueError, match="inner_options"):
        specjax.init_drafter("rasd", target).with_budget(inner_options=dict(candidates=1))
    with pytest.raises(ValueError, match="'traversal' needs.*drafter 'rasd' offers top"):
        specjax.generate(target, PROMPTS, fused(inner), temperature=1.0, rule="traversal")


# ---- training ------------------------------------------------------------------------------------


def test_training_it_is_training_the_inner_drafter(target, inner):
    tokens = np.random.default_rng(0).integers(12, size=(2, 11)).astype(np.int32)
    batch = {"tokens": tokens, "supervised": np.ones_like(tokens, bool)}
    objective = make_objective(common.loss(), 10)
    outer = fused(inner, PROMPTS)
    weights = {k: v for k, v in outer.params.items() if k != "buffers"}

    def loss(drafter):
        frozen = {"target": target.params, "buffers": drafter.params.get("buffers", {})}
        one = lambda w: drafter_loss(drafter.definition, objective, w, frozen, batch)[0]  # noqa: E731
        return jax.value_and_grad(one)(weights)

    (ours, our_gradient), (its, its_gradient) = loss(outer), loss(inner)
    assert ours == its
    jax.tree.map(np.testing.assert_array_equal, our_gradient, its_gradient)


def test_it_learns_online_if_the_inner_drafter_does(target, inner):
    settings = common.optimizer(1e-2, warmup_steps=0), common.loss()
    outer = fused(inner, PROMPTS, continuation=3, min_suffix=1)
    trainer = OnlineTrainer(target, outer, *settings, interval=2, length=24)
    trainer.generate(PROMPTS[:2], max_new_tokens=12, stop_tokens=())
    assert trainer.updates == 1
    corpus = trainer.drafter.params["buffers"]["corpus"]
    jax.tree.map(np.testing.assert_array_equal, corpus, outer.params["buffers"]["corpus"])
    assert (trainer.drafter.params["fc"] != inner.params["fc"]).any()
    with pytest.raises(ValueError, match="'rasd' is not trained"):
        OnlineTrainer(target, specjax.init_drafter("rasd", target), *settings)


@dataclasses.dataclass(frozen=True)
class Learner(FastEagle):
    """Counts the requests that it has served, in a buffer of its own."""

    def init(self, key, target_params):
        return super().init(key, target_params) | {"buffers": {"served": jnp.zeros((), jnp.int32)}}

    def keep(self, params, state):
        return params | {"buffers": {"served": params["buffers"]["served"] + 1}}


def test_what_the_inner_drafter_learns_from_use_is_kept_beside_the_corpus(target, inner):
    definition = Learner(target.config, **INNER)
    params = inner.params | {"buffers": {"served": jnp.zeros((), jnp.int32)}}
    drafter = fused(dataclasses.replace(inner, definition=definition, params=params), PROMPTS)
    for served in (1, 2):
        drafter = specjax.generate(target, PROMPTS[:1], drafter, 4).drafter
        assert drafter.params["buffers"]["served"] == served
        assert drafter.params["buffers"]["corpus"]["tokens"].shape == (22,)
