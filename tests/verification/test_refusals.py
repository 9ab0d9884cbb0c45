"""What rules do not cover is refused by name, before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import ROWS, RULES, some_drafts
from toys import toy_target

import specjax
from specjax import decoding
from specjax.trees import chains
from specjax.verification import get_rule, law, make_noise, rule_names, verify


@pytest.fixture(scope="module")
def target():
    return toy_target(num_layers=3)


@pytest.fixture(scope="module")
def tree(target):
    return specjax.init_drafter("fasteagle", target, num_layers=2, candidates=2)


@pytest.fixture(scope="module")
def dynamic(target):
    return specjax.init_drafter("eagle3", target, steps=2, top_k=2, total_nodes=6)


def compilations():
    return (
        decoding.jit_round._cache_size(),
        decoding._prefill_target._cache_size(),
        decoding._first_state._cache_size(),
    )


@pytest.mark.parametrize(
    "drafter, rule, parameters, message",
    [
        ("tree", "token", {}, "'token' verifies one chain; drafter 'fasteagle' drafts a tree"),
        ("tree", "block", {}, "'block' verifies one chain; drafter 'fasteagle' drafts a tree"),
        ("dynamic", "token", {}, "'token' verifies one chain; drafter 'eagle3' drafts a tree"),
        ("dynamic", "block", {}, "'block' verifies one chain; drafter 'eagle3' drafts a tree"),
        ("tree", "judge", {"base": "token"}, "'judge' verifies one chain"),
        (
            "dynamic", "recursive_rejection", {"replacement": True},
            "'recursive_rejection' needs a draft drawn 'with_replacement'.*'eagle3' offers top",
        ),
        (
            "dynamic", "traversal", {"replacement": True},
            "'traversal' needs a draft drawn 'with_replacement'.*'eagle3' offers top",
        ),
        ("tree", "greedy", {}, "'greedy' decodes at temperature 0 only"),
    ],
)  # fmt: skip
def test_unsupported_combinations_are_named(target, request, drafter, rule, parameters, message):
    drafter, before = request.getfixturevalue(drafter), compilations()
    with pytest.raises(ValueError, match=message):
        specjax.generate(
            target, [[1, 2]], drafter, 4, temperature=1.0, rule=get_rule(rule, **parameters)
        )
    assert compilations() == before


@pytest.mark.parametrize("name", RULES)
def test_a_mask_of_forced_nodes_is_heeded_or_refused(name):
    rule, shapes, kind = RULES[name]
    drafts, targets, _ = some_drafts(1, shapes, kind)
    draft, logp_TxV = jax.tree.map(lambda x: x[0], drafts), targets[0]
    if rule.forces:
        free_T, forced_T = (law(draft, logp_TxV, rule, f)[0] for f in (None, np.ones(ROWS, bool)))
        assert np.abs(free_T - forced_T).max() > 0.01
        return
    for run in (law, lambda *args: verify(make_noise(jax.random.key(0), ROWS, 2), *args)):
        with pytest.raises(ValueError, match=f"force_T: rule '{rule.name}' cannot force nodes"):
            run(draft, logp_TxV, rule, np.zeros(ROWS, bool))


def test_a_judge_head_of_another_width_is_refused(target, tree):
    head = specjax.verification.JudgeHead([1.0] * 5)
    with pytest.raises(ValueError, match="'judge': the head reads 5 features, the target has 16"):
        specjax.generate(target, [[1]], tree, 4, temperature=1.0, rule=get_rule("judge", head=head))


@pytest.mark.parametrize("rule", ["k_sec", "tokens", ""])
def test_unknown_rules_are_named(target, tree, rule):
    with pytest.raises(ValueError, match=f"rule: '{rule}' is unknown; one of .*'k_seq'"):
        specjax.generate(target, [[1]], tree, 4, temperature=1.0, rule=rule)


@pytest.mark.parametrize("name", rule_names())
def test_unknown_parameters_are_named(name):
    with pytest.raises(ValueError, match=f"'{name}'.*window"):
        get_rule(name, window=3)


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("typical", {"epsilon": 0.0}, "'typical': epsilon 0.0"),
        ("typical", {"delta": -0.3}, "'typical'.*delta -0.3"),
        ("typical", {"epsilon": float("nan")}, "'typical': epsilon nan"),
        ("lenient", {"lenience": 0.0}, "'lenient': lenience 0.0"),
        ("lenient", {"lenience": 1.1}, "'lenient': lenience 1.1"),
        ("lenient", {"lenience": float("nan")}, "'lenient': lenience nan"),
        ("k_seq", {"k": 0}, "'k_seq'.*'k'"),  # k is the draft's, not the rule's
        ("judge", {"threshold": 1.5}, "'judge': threshold 1.5"),
        ("judge", {"threshold": float("nan")}, "'judge': threshold nan"),
        ("judge", {"base": "block"}, "'judge': base 'block' is not one of"),
    ],
)
def test_parameters_out_of_range_are_named(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        get_rule(name, **parameters)


@pytest.mark.parametrize("weights", [[[1.0, 2.0]], [1.0, float("nan")], 3.0])
def test_judge_heads_must_be_vectors_of_finite_numbers(weights):
    with pytest.raises(ValueError, match="judge head: finite weights of one axis"):
        specjax.verification.JudgeHead(weights)


def test_k_seq_refuses_a_draft_without_its_law():
    tree = jax.tree.map(lambda x: x[0], chains(2, 1).draft(jnp.array([[0, 1, 2]])))
    logp_TxV = jnp.log(jnp.full((3, 4), 0.25))
    with pytest.raises(ValueError, match="'k_seq': the draft's law was not recorded"):
        law(tree, logp_TxV, get_rule("k_seq"))
    with pytest.raises(ValueError, match="'k_seq': the draft's law was not recorded"):
        verify(make_noise(jax.random.key(0), 3, 1), tree, logp_TxV, get_rule("k_seq"))
