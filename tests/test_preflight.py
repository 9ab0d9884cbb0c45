"""What cannot be decoded is refused before anything is trained, and names its field."""

import importlib
import pathlib

import pytest
from toys import toy_target

import specjax
from configs import fasteagle
from experiments import compare
from experiments.commands import Refused, refusals
from experiments.preflight import check_config, check_methods, check_prompts
from specjax.data.prompt_files import Prompt
from specjax.evaluation.benchmark import Method

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = {p.stem for p in (ROOT / "configs").glob("*.py")} - {
    "__init__",
    "builtin_target",
    "common",
}


@pytest.fixture
def config():
    return fasteagle.get_config("smoke")


class Letters:
    """A tokenizer of a token a letter."""

    chat_template = None
    bos_token_id = None

    def encode(self, text, **_):
        return [1 + ord(c) % 11 for c in text]


@pytest.fixture(scope="module")
def target():
    return toy_target(tokenizer=Letters())


@pytest.mark.parametrize("field, value, words", [
    ("eval.rule", "tokens", "eval.rule: 'tokens' is unknown; one of .*'token'"),
    ("eval.rule", "judge", "eval.rule: 'judge' forces nothing without a trained head"),
    ("eval.temperatures", (-1,), "eval.temperatures: temperature: -1 must be"),
    ("eval.temperatures", (), "eval.temperatures: .* must be some"),
    ("eval.temperatures", (0.0, 0.0), "eval.temperatures: .* each once"),
    ("eval.tasks", (), "eval.tasks: .* must be some"),
    ("eval.top_k", -1, "eval.top_k: -1 must be"),
    ("eval.top_p", 0.0, "eval.top_p: 0.0 must be"),
    ("eval.prompts", -1, "eval.prompts: -1 must be at least 0"),
    ("eval.max_prompt_tokens", -1, "eval.max_prompt_tokens: -1 must be at least 0"),
    ("eval.max_new_tokens", 1, "eval.max_new_tokens: 1 must be at least 2"),
    ("eval.repeats", 0, "eval.repeats: 0 must be at least 1"),
    ("eval.timing_repeats", 0, "eval.timing_repeats: 0 must be at least 1"),
    ("eval.batch", 0, "eval.batch: 0 must be at least 1"),
    ("eval.bootstrap", 0, "eval.bootstrap: 0 must be at least 1"),
    ("calibrate.max_new_tokens", 1, "calibrate.max_new_tokens: 1 must be at least 2"),
    ("train.tau_prompts", 0, "train.tau_prompts: 0 must be at least 1"),
    ("train.loss.gate", "recorded", "train.loss.gate: 'recorded' weighs by what OnlineTrainer"),
    ("train.loss.gate", "none", "train.loss: gate: 'none' is unknown; one of"),
    ("train.loss.divergence", "l2", "train.loss: divergence: 'l2' is unknown; one of"),
    ("train.loss.temperature", 0.0, "train.loss: temperature: 0.0 must be"),
    ("train.loss.chunk", -1, "train.loss: chunk: -1 must be at least 0"),
    ("train.optimizer.name", "sgd", "train.optimizer.name: 'sgd' is unknown; one of"),
    ("train.tau_new_tokens", 1, "train.tau_new_tokens: 1 must be at least 2"),
])  # fmt: skip
def test_a_value_out_of_range_is_named(config, field, value, words):
    check_config(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=f"^{words}"):
        check_config(config)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_may_start(name):
    recipe = importlib.import_module(f"configs.{name}")
    for preset in ("", "smoke", *(fasteagle.PUBLISHED if name == "fasteagle" else ())):
        check_config(recipe.get_config(preset))


def test_nothing_is_loaded_or_decoded_first(config, target, tmp_path, monkeypatch):
    """A setting is refused before the target is read, a rule that does not suit before training."""
    monkeypatch.setattr(compare, "load_target", lambda *_: target)
    monkeypatch.setattr(compare, "load_prompts", lambda *_, **__: [Prompt(1, "c", ("abc",))])
    monkeypatch.setattr(compare, "training_data", lambda *_: ([[1, 2]], {}))
    config.eval.rule, config.train.tau_every = "token", 0
    config.drafters = importlib.import_module("configs.prompt_lookup").get_config().drafters
    with pytest.raises(ValueError, match="eval.rule: drafters.prompt_lookup at temperature 1"):
        compare.prepare(config, tmp_path)
    monkeypatch.setattr(compare, "training_data", pytest.fail)
    config.eval.max_prompt_tokens = 0
    monkeypatch.setattr(compare, "load_prompts", lambda *_, **__: [Prompt(1, "c", ("a" * 300,))])
    with pytest.raises(ValueError, match="eval.max_prompt_tokens: question 1 of task 'stdlib'"):
        compare.prepare(config, tmp_path)
    monkeypatch.setattr(compare, "load_target", pytest.fail)
    config.eval.rule = "judge"
    with pytest.raises(Refused, match="eval.rule: 'judge'"):
        compare.prepare(config, tmp_path)


@pytest.mark.parametrize("error, refused", [
    (ValueError("as it was"), True), (FileNotFoundError("as it was"), True),
    (FloatingPointError("as it was"), False), (RuntimeError("as it was"), False),
])  # fmt: skip
def test_only_what_users_give_is_refused(error, refused):
    with pytest.raises(Refused if refused else type(error), match="^as it was$") as raised:
        with refusals():
            raise error
    assert (raised.value.__cause__ is error) == refused


def test_a_drafters_own_training_is_named_as_its_own(config):
    config.drafters.fasteagle.train.loss = dict(gate="none")
    with pytest.raises(ValueError, match="^drafters.fasteagle.train.loss: gate: 'none'"):
        check_config(config)


def test_what_is_not_read_is_not_refused(config):
    config.train.tau_every, config.train.tau_prompts = 0, 0
    config.calibrate.prompts, config.calibrate.max_new_tokens = 0, 0
    check_config(config)
    config.drafters.fasteagle.train.tau_every = 5  # one drafter's own is enough
    with pytest.raises(ValueError, match="train.tau_prompts"):
        check_config(config)


def test_a_rule_must_suit_every_tree_at_every_temperature(config, target):
    init = lambda **tree: specjax.init_drafter("fasteagle", target, num_layers=2, **tree)  # noqa: E731
    tree, chain = Method("tree", init(candidates=2)), Method("chain", init())
    config.eval.rule = "token"
    check_methods(config, target, [chain])
    with pytest.raises(ValueError, match="eval.rule: drafters.tree at temperature 1: .*one chain"):
        check_methods(config, target, [chain, tree])
    config.eval.temperatures = (0.0,)  # where every exact rule is greedy
    check_methods(config, target, [chain, tree])


@pytest.mark.parametrize("turns", [("a" * 256,), ("a" * 128, "b" * 128)])
def test_a_prompt_that_leaves_no_room_is_named(config, target, turns):
    """The context is 256: two turns meet in the second one's prompt."""
    config.eval.max_prompt_tokens = 0
    tasks = {"t": [Prompt(1, "c", ("a" * 255,)), Prompt("q", "c", turns)]}
    with pytest.raises(ValueError, match="eval.max_prompt_tokens: question 'q' of task 't' has 25"):
        check_prompts(config, target, tasks)
    config.eval.max_prompt_tokens = 255
    check_prompts(config, target, tasks)
