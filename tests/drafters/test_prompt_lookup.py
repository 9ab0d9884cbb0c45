"""Prompt lookup against plain Python, on hundreds of random texts of a few letters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_target

import specjax
from specjax.drafters import Context
from specjax.drafters.prompt_lookup import PromptLookup
from specjax.sampling import Sampling
from specjax.verification import get_rule, rule_names

S = 48
CONFIG = toy_target().config


def looked_up(text, max_ngram, K, prefer, partial):
    """The draft for one text: a list of at most K tokens."""
    for n in range(min(max_ngram, len(text) - 1), 0, -1):
        ends = [i + n for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        whole = [end for end in ends if end + K <= len(text)]
        if whole:
            end = whole[0] if prefer == "first" else whole[-1]
        elif ends and partial:
            end = ends[0]
        else:
            continue
        return text[end : end + K]
    return []


def as_released(text, max_ngram, K):
    """The earliest occurrence that does not touch the newest tokens and has a whole draft."""
    length = len(text)
    for n in range(max_ngram, 0, -1):
        for i in range(length - n):
            window, end = text[i : i + n], i + n + K
            if window == text[-n:] and end <= length and i + n < length - n:
                return text[i + n : end]
    return []


def random_texts(count=400, seed=0):
    """Texts over 1 to 5 letters, periodic ones among them, of 1 to S tokens."""
    random = np.random.RandomState(seed)
    texts = []
    for _ in range(count):
        letters, length = random.randint(1, 6), random.randint(1, S - 10)
        text = random.randint(letters, size=length)
        if random.rand() < 0.2:
            text = np.resize(text[: random.randint(1, 6)], length)
        texts.append(text.tolist())
    return texts


def drafts(definition, texts, junk=0):
    """The batched tree; what lies past a text is junk, as verification leaves it."""
    tokens = np.random.RandomState(junk).randint(-1, 5, (len(texts), S)).astype(np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    context = Context(tokens, np.array([len(t) for t in texts], np.int32))
    draft = jax.jit(lambda context: definition.draft({}, {}, (), context, None)[0])
    return jax.device_get(draft(context))


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("prefer", ["first", "last"])
@pytest.mark.parametrize("max_ngram, K", [(3, 9), (1, 2), (4, 1), (2, 4)])
def test_equals_plain_python(max_ngram, K, prefer, partial):
    definition = PromptLookup(CONFIG, max_ngram, K, prefer, partial)
    texts = random_texts()
    tree = drafts(definition, texts)
    lengths = set()
    for b, text in enumerate(texts):
        expected = looked_up(text, max_ngram, K, prefer, partial)
        assert tree.tokens_T[b, 0] == text[-1]
        assert tree.valid_T[b].tolist() == [i <= len(expected) for i in range(K + 1)]
        assert tree.tokens_T[b, 1 : len(expected) + 1].tolist() == expected
        lengths.add(len(expected))
    assert lengths == ({*range(K + 1)} if partial else {0, K})
    for other in jax.tree.leaves(jax.tree.map(np.array_equal, tree, drafts(definition, texts, 1))):
        assert other, "tokens past the committed ones were read"


@pytest.mark.parametrize("max_ngram, K", [(3, 10), (3, 4), (1, 2)])
def test_the_earliest_whole_drafts_are_the_released_rule_s(max_ngram, K):
    """K > max_ngram: an occurrence with a whole draft never touches the newest tokens."""
    definition = PromptLookup(CONFIG, max_ngram, K, "first", False)
    texts = random_texts(seed=1)
    tree, found = drafts(definition, texts), 0
    for b, text in enumerate(texts):
        expected = as_released(text, max_ngram, K)
        assert tree.tokens_T[b][tree.valid_T[b]].tolist() == text[-1:] + expected
        found += bool(expected)
    assert found > 50


@pytest.mark.parametrize("prefer", ["first", "last"])
def test_what_repeats_is_continued(prefer):
    """Period P, any phase: all K tokens are right, where the n-gram is that old."""
    definition = PromptLookup(CONFIG, 3, 8, prefer)
    texts = [
        np.resize(np.arange(P), length).tolist()
        for P in range(1, 8)
        for length in range(P + 2 + 8, 30)
    ]
    tree = drafts(definition, texts)
    assert tree.valid_T.all()
    for b, text in enumerate(texts):
        period = max(text) + 1
        going_on = [(len(text) + i) % period for i in range(8)]
        assert tree.tokens_T[b, 1:].tolist() == going_on


def test_a_text_without_repeats_drafts_nothing():
    tree = drafts(PromptLookup(CONFIG), [[1], [1, 2, 3, 4, 0], [*range(5, 40)]])
    assert tree.valid_T.tolist() == 3 * [[True] + 10 * [False]]


@dataclasses.dataclass(frozen=True)
class Littered(PromptLookup):
    """Fills the invalid rows with what would be accepted, were they valid."""

    answers: tuple[tuple[int, ...], ...] = ()  # prompts and what the target says to them

    def draft(self, params, target_params, state, context, key):
        tree, state = super().draft(params, target_params, state, context, key)
        place_BxT = context.lengths_B[:, None] - 1 + tree.depth_T
        right = jnp.take_along_axis(jnp.array(self.answers), place_BxT, axis=1, mode="clip")
        return tree.replace(tokens_T=jnp.where(tree.valid_T, tree.tokens_T, right)), state


def test_invalid_rows_change_nothing():
    target, prompts = toy_target(), [[1], [3, 3, 3], [2, 3, 4]]
    drafter = specjax.init_drafter("prompt_lookup", target, max_ngram=2, draft_depth=4)
    out = specjax.generate(target, prompts, drafter, 20, stop_tokens=())
    answers = [np.resize(p + new, 30) for p, new in zip(prompts, out.tokens, strict=True)]
    fields = {f.name: getattr(drafter.definition, f.name) for f in dataclasses.fields(PromptLookup)}
    littered = Littered(**fields, answers=tuple(tuple(a.tolist()) for a in answers))
    other = dataclasses.replace(drafter, definition=littered)
    again = specjax.generate(target, prompts, other, 20, stop_tokens=())
    assert again.tokens == out.tokens and again.accept_lengths == out.accept_lengths
    assert {1, 5} <= {n for lengths in out.accept_lengths for n in lengths[1:]}


@pytest.mark.parametrize("drafter", ["prompt_lookup", "token_recycling"])
def test_rules_that_need_sampled_drafts_are_refused_by_name(drafter):
    definition = specjax.init_drafter(drafter, toy_target()).definition
    refused = set()
    for name in set(rule_names()) - {"judge"}:  # which wants a head
        rule = get_rule(name)
        if rule.draws != "top":
            refused.add(name)
            with pytest.raises(ValueError, match=f"{name}.*{drafter}.* offers top"):
                rule.check(Sampling(1.0), definition)
    assert {"token", "block", "traversal", "recursive_rejection", "k_seq"} <= refused
    get_rule("match").check(Sampling(1.0), definition)


@pytest.mark.parametrize(
    "field, value", [("max_ngram", 0), ("draft_depth", 0), ("prefer", "best"), ("draft_depth", -1)]
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        specjax.init_drafter("prompt_lookup", toy_target(), **{field: value})
