"""The public calls: what they return, and what they say about bad input."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toys import PROMPTS, greedy_continuations, toy_target, truncated

import specjax
from specjax import decoding, generation
from specjax.verification.match import Match

EOS, CONTEXT = 5, 22
WORDS = "zero one two three four five six seven eight nine ten eleven".split()


class Tokenizer:
    """As much of a Hugging Face tokenizer as is used; puts a special token in front."""

    bos = 2

    def __call__(self, text):
        return {"input_ids": [self.bos, *map(WORDS.index, text.split())]}

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids)


@pytest.fixture(scope="module")
def target():
    return toy_target(
        seed=34, num_layers=2, max_position_embeddings=CONTEXT, eos_token_ids=(EOS,),
        tokenizer=Tokenizer(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def drafter(target):
    return specjax.init_drafter("fasteagle", target, num_layers=2, candidates=3)


@pytest.fixture(scope="module")
def endless(target):
    return greedy_continuations(target, PROMPTS, CONTEXT, width=40)


def expected(endless, limit, stops):
    room = [min(limit, CONTEXT - len(p)) for p in PROMPTS]
    return [truncated(e, n, stops) for e, n in zip(endless, room, strict=True)]


def test_the_public_surface():
    names = "generate init_drafter load_drafter load_target drafter_names verification".split()
    assert set(names) <= set(specjax.__all__) and all(hasattr(specjax, n) for n in names)
    parameters = inspect.signature(specjax.generate).parameters
    assert {n: p.default for n, p in parameters.items() if p.default is not p.empty} == dict(
        drafter=None, max_new_tokens=128, temperature=0.0, top_k=0, top_p=1.0, seed=0,
        stop_tokens=None, rule=None,
    )  # fmt: skip
    assert list(parameters)[:3] == ["target", "prompts", "drafter"]
    assert {"fasteagle", "eagle3"} <= set(specjax.drafter_names())
    rule = specjax.verification.get_rule("match")
    assert rule.name == "match" and rule.exact is True


def test_a_target_gives_logits(target):
    logits = target.logits([[1, 2, 3], [4, 5, 6]])
    assert logits.shape == (2, 3, 12) and logits.dtype == jnp.float32
    assert target.config.vocab_size == 12 and isinstance(target.params, dict)


# ---- what is generated ---------------------------------------------------------------------------


@pytest.mark.parametrize("with_drafter", [False, True], ids=["vanilla", "fasteagle"])
def test_generate_to_the_stop_or_the_end_of_the_context(target, drafter, endless, with_drafter):
    out = specjax.generate(target, PROMPTS, drafter if with_drafter else None, 40)
    assert out.tokens == expected(endless, 40, (EOS,))
    assert [t[-1] == EOS for t in out.tokens] == [True, True, True, False]
    assert len(out.tokens[3]) == CONTEXT - len(PROMPTS[3])  # cut by the context
    assert out.texts == [" ".join(WORDS[i] for i in row) for row in out.tokens]
    for tokens, accepted in zip(out.tokens, out.accept_lengths, strict=True):
        assert accepted[0] == 1 and sum(accepted) == len(tokens)
        assert min(accepted) >= 1 and max(accepted) <= (3 if with_drafter else 1)
        assert all(type(n) is int for n in (*tokens, *accepted))
    assert any(len(a) < len(t) for a, t in zip(out.accept_lengths, out.tokens, strict=True)) == (
        with_drafter
    )


def test_max_new_tokens_is_exact_and_compiles_nothing(target, drafter, endless):
    specjax.generate(target, PROMPTS, drafter, 9)
    compiled = decoding.jit_round._cache_size()
    for count in (1, 2, 5, 8):
        out = specjax.generate(target, PROMPTS, drafter, count)
        assert out.tokens == expected(endless, count, (EOS,))
        assert [sum(a) for a in out.accept_lengths] == [len(t) for t in out.tokens]
    assert out.tokens != expected(endless, 9, (EOS,))
    assert specjax.generate(target, PROMPTS, drafter, 1).accept_lengths == [[1]] * len(PROMPTS)
    assert decoding.jit_round._cache_size() == compiled


def test_stop_tokens(target, endless):
    for stops in ((), (2, 6)):
        out = specjax.generate(target, PROMPTS, max_new_tokens=12, stop_tokens=stops)
        assert out.tokens == expected(endless, 12, stops)
    out = specjax.generate(target, PROMPTS, max_new_tokens=12, stop_tokens=[EOS])
    assert out == specjax.generate(target, PROMPTS, max_new_tokens=12)  # the config's own


def test_the_config_s_own_end_may_lie_outside_the_vocabulary(target):
    config = target.config.replace(eos_token_ids=(EOS, 999))
    wider = dataclasses.replace(target, config=config)
    out = specjax.generate(wider, PROMPTS, max_new_tokens=12)
    assert out == specjax.generate(target, PROMPTS, max_new_tokens=12)


def test_a_limit_past_the_context_costs_no_slots(target, drafter, endless):
    """Neither memory nor another program: what fits the context decides."""
    engine, params = generation.make_engine(target, drafter)
    slots = [generation.start(engine, params, PROMPTS, n).cache.slots for n in (13, 100_000, 2**40)]
    assert slots == [64, 64, 64]
    out = specjax.generate(target, PROMPTS, drafter, 2**40)
    assert out.tokens == expected(endless, CONTEXT, (EOS,))
    # What fits is counted as it was.
    assert generation.cache_slots(engine, 9, 13) == -(-(22 + engine.scratch) // 64) * 64


def test_a_string_is_its_ids_with_special_tokens(target, endless):
    assert PROMPTS[1] == [Tokenizer.bos, 3, 4]
    out = specjax.generate(target, [PROMPTS[0], "three four", [3, 4], PROMPTS[3]], max_new_tokens=9)
    whole = expected(endless, 9, (EOS,))
    assert out.tokens[:2] == whole[:2] and out.tokens[3] == whole[3]
    assert out.tokens[2] != whole[1]


def test_seeds(target):
    def run(seed, **options):
        options = dict(max_new_tokens=12, temperature=1.0, stop_tokens=()) | options
        return specjax.generate(target, [[1]] * 4, seed=seed, **options)

    first = run(0)
    assert first == run(0)  # tokens, texts, accept_lengths
    assert run(1).tokens != first.tokens
    assert len({tuple(t) for t in first.tokens}) == 4  # noise belongs to the request
    assert run(0, temperature=0.0) == run(1, temperature=0.0)


def test_rules_by_name_and_as_objects(target, drafter):
    def run(rule):
        return specjax.generate(target, PROMPTS, drafter, 9, rule=rule)

    assert run(None) == run("match") == run("greedy") == run(Match())


def test_without_a_tokenizer_texts_are_empty_and_strings_refused(target):
    bare = dataclasses.replace(target, tokenizer=None)
    out = specjax.generate(bare, PROMPTS, max_new_tokens=9)
    assert out.texts == [""] * len(PROMPTS) and all(out.tokens)
    with pytest.raises(ValueError, match=r"prompts\[1\].*tokenizer"):
        specjax.generate(bare, [[1], "two"])


def test_buckets():
    sizes = [generation.bucket(n) for n in range(1, 5000)]
    assert all(size >= n for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes) and len(set(sizes)) <= 12


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, match",
    [
        ([], r"prompts: .*empty"),
        ("one two", r"prompts: a list"),
        (3, r"prompts: a list"),
        ([[1], []], r"prompts\[1\]: empty"),
        (["one", ""], r"prompts\[1\]: empty"),
        ([[1], [1] * CONTEXT], rf"prompts\[1\]: {CONTEXT} tokens.*context of {CONTEXT}"),
        ([[1], [2, 12]], r"prompts\[1\]: token 12 .*vocabulary of 12"),
        ([[-1]], r"prompts\[0\]: token -1 .*vocabulary"),
        ([1, 2, 3], r"prompts\[0\]: 1 is not .*one prompt of ids is \[\[1, 2\]\]"),
        ([[1], None], r"prompts\[1\]: None is not a string"),
        ([["a", "b"]], r"prompts\[0\]: 'a' is not a token id"),
        ([[1.9, 2.9]], r"prompts\[0\]: 1.9 is not a token id"),
    ],
)
def test_bad_prompts_are_named(target, prompts, match):
    with pytest.raises(ValueError, match=match):
        specjax.generate(target, prompts, max_new_tokens=9)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(max_new_tokens=0), "max_new_tokens: 0"),
        (dict(max_new_tokens=-3), "max_new_tokens: -3"),
        (dict(max_new_tokens=2.5), "max_new_tokens: 2.5"),
        (dict(temperature=-0.1), "temperature: -0.1"),
        (dict(temperature=float("nan")), "temperature: nan"),
        (dict(temperature=float("inf")), "temperature: inf"),
        (dict(temperature=1.0, top_p=0.0), "top_p: 0.0"),
        (dict(temperature=1.0, top_p=1.1), "top_p: 1.1"),
        (dict(temperature=1.0, top_k=-1), "top_k: -1"),
        (dict(temperature=1.0, top_k=2.7), "top_k: 2.7"),
        (dict(top_k=2.7), "top_k: 2.7"),
        (dict(rule="mtach"), "rule: 'mtach' is unknown.*match"),
        (dict(temperature=1.0, rule="greedy"), "rule 'greedy'.*temperature 0"),
        (dict(stop_tokens=["</s>"]), r"stop_tokens\[0\]: '</s>' is not a token id"),
        (dict(stop_tokens="</s>"), r"stop_tokens\[0\]: '<' is not a token id"),
        (dict(stop_tokens=[3, 12]), r"stop_tokens\[1\]: token 12 .*vocabulary of 12"),
        (dict(stop_tokens=[-1]), r"stop_tokens\[0\]: token -1 "),
        (dict(stop_tokens=[2.0]), r"stop_tokens\[0\]: 2.0 is not a token id"),
        (dict(stop_tokens=[[2]]), r"^stop_tokens\[0\]: \[2\] is not a token id$"),
        (dict(stop_tokens=5), "stop_tokens: 5 is not a list"),
        (dict(seed=2**40), "seed: 1099511627776 "),
        (dict(seed=-1), "seed: -1 "),
        (dict(seed=0.5), "seed: 0.5 is not a whole number"),
        (dict(drafter="prompt_lookup"), "drafter: 'prompt_lookup'.*init_drafter or load_drafter"),
    ],
)
def test_bad_settings_are_named(target, options, match):
    with pytest.raises(ValueError, match=match):
        specjax.generate(target, PROMPTS, **options)


@pytest.mark.parametrize(
    "tokens, match",
    [
        ([1, 2, 3], r"tokens: .*\[\[1, 2\]\] is one row.*shape \(3,\)"),
        ([[1, 2], [3]], "tokens: rows of one length"),
        ([[1, 12]], "tokens: 12 is outside the vocabulary of 12"),
        ([[1, -1]], "tokens: -1 is outside"),
        ([[1.5, 2.0]], "tokens: .*not float64"),
        (jnp.ones(3, jnp.int32), r"tokens: .*shape \(3,\)"),
    ],
)
def test_bad_tokens_are_named(target, tokens, match):
    with pytest.raises(ValueError, match=match):
        target.logits(tokens)


def test_logits_can_be_traced(target):
    tokens = np.array([[1, 2, 3]])
    traced = jax.jit(lambda t: target.logits(t))(tokens)
    np.testing.assert_allclose(traced, target.logits(tokens), atol=1e-5)


def test_a_drafter_of_another_target_is_refused(drafter):
    other = toy_target(seed=1, num_layers=2, max_position_embeddings=CONTEXT)
    with pytest.raises(ValueError, match="'fasteagle' was made for another target"):
        specjax.generate(other, PROMPTS, drafter)


@pytest.mark.parametrize("name", ["fasteagle", "eagle3"])
def test_a_drafter_with_a_draft_vocabulary_survives_its_folder(target, name, tmp_path):
    depth = {"fasteagle": dict(num_layers=2), "eagle3": dict(steps=2)}[name]
    made = specjax.init_drafter(
        name, target, draft_vocab_size=4, vocab_ids=[7, 1, 4, 9], **depth
    )  # fmt: skip
    made.save(tmp_path)
    loaded = specjax.load_drafter(tmp_path, target)
    assert loaded.definition == made.definition
    assert loaded.params["buffers"]["vocab_ids"].tolist() == [1, 4, 7, 9]
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, made.params))


@pytest.mark.parametrize("ids", [[1, 2, 3], [1, 2, 2, 3], [[1, 2], [3, 4]]], ids=str)
def test_vocab_ids_must_be_as_many_as_the_draft_vocabulary(target, ids):
    with pytest.raises(ValueError, match="vocab_ids"):
        specjax.init_drafter(
            "fasteagle", target, num_layers=2, draft_vocab_size=4, vocab_ids=np.array(ids)
        )


@pytest.mark.parametrize(
    "ids, match",
    [
        ([-5, 1], "vocab_ids: -5 is outside"),
        ([1, 99], "vocab_ids: 99 .*of 12"),
        ([0.5, 1], "float"),
    ],
)
def test_vocab_ids_are_the_target_s(target, ids, match):
    with pytest.raises(ValueError, match=match):
        specjax.init_drafter(
            "fasteagle", target, num_layers=2, draft_vocab_size=2, vocab_ids=ids
        )  # fmt: skip


# ---- drafters' folders ---------------------------------------------------------------------------


def test_save_overwrites_drafters_and_nothing_else(target, drafter, tmp_path):
    drafter.save(tmp_path)
    drafter.save(tmp_path)
    specjax.load_drafter(tmp_path, target)
    for name, text in (
        ("config.json", '{"model_type": "llama"}'),
        ("model.safetensors.index.json", '{"weight_map": {}}'),
    ):
        folder = tmp_path / f"holds {name}"
        folder.mkdir()
        (folder / "model.safetensors").write_text("theirs")
        (folder / name).write_text(text)
        with pytest.raises(FileExistsError, match=f"{name}: the folder holds another model"):
            drafter.save(folder)
        files = {path.name: path.read_text() for path in folder.iterdir()}
        assert files == {name: text, "model.safetensors": "theirs"}


@pytest.fixture(scope="module")
def folder_of(target, tmp_path_factory):
    """record changes, tensor changes -> a drafter's folder with them."""
    made = specjax.init_drafter("fasteagle", target, num_layers=2, draft_vocab_size=4)

    def write(change=lambda record: None, tensors=None):
        folder = tmp_path_factory.mktemp("drafter")
        made.save(folder)
        config, weights = folder / "config.json", folder / "model.safetensors"
        record = json.loads(config.read_text())
        change(record)
        config.write_text(json.dumps(record))
        save_file(load_file(weights) | (tensors or {}), weights)
        return folder

    return write


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda r: r.update(drafter="x"), "drafter: 'x' is not an object"),
        (lambda r: r["drafter"].update(target=[3]), r"target: \[3\] is not an object"),
        (lambda r: r.pop("algorithm"), "algorithm: missing"),
        (lambda r: r.update(algorithm="faseagle"), "'faseagle' is unknown"),
        (lambda r: r["drafter"]["target"].pop("rope_scaling"), "rope_scaling: missing"),
        (lambda r: r["drafter"]["target"].update(num_kv_heads=0), "num_kv_heads: 0 "),
        (
            lambda r: r["drafter"]["target"].update(num_layers=9),
            "target.num_layers: 9, but toy has 2",
        ),
        (lambda r: r["drafter"]["target"].update(rope_theta=5e5), "target.rope_theta: 500000.0"),
        (lambda r: r["drafter"].update(num_layers=2.5), "num_layers: 2.5 must be a whole number"),
    ],
)
def test_a_damaged_record_is_named(target, folder_of, change, match):
    with pytest.raises(ValueError, match=rf"config\.json: .*{match}"):
        specjax.load_drafter(folder_of(change), target)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("norm.scale", np.full(16, np.nan, np.float32), "norm.scale holds NaN or infinity"),
        ("fc", np.full((48, 16), np.inf, np.float32), "fc holds NaN or infinity"),
        ("buffers.vocab_ids", np.array([0, 1, 2, 12], np.int32), "vocab_ids: 12 is outside"),
    ],
)
def test_a_damaged_tensor_is_named(target, folder_of, name, value, match):
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{match}"):
        specjax.load_drafter(folder_of(tensors={name: value}), target)


def test_what_a_target_may_call_otherwise(target, folder_of):
    """Ends, context and family's name change when a model is released again; its weights do not."""
    changes = dict(eos_token_ids=[1], max_position_embeddings=9, model_type="mistral")
    specjax.load_drafter(folder_of(lambda r: r["drafter"]["target"].update(changes)), target)


def test_fields_are_numbers_where_numbers_are_meant(target, drafter):
    with pytest.raises(ValueError, match="num_layers: 2.5 must be a whole number"):
        specjax.init_drafter("fasteagle", target, num_layers=2.5)
    with pytest.raises(ValueError, match="candidates: '3' must be a whole number"):
        drafter.with_budget(candidates="3")
    with pytest.raises(ValueError, match="threshold: None must be a number"):
        specjax.init_drafter("draft_model", target, threshold=None)
    with pytest.raises(ValueError, match="seed: 4294967296"):
        specjax.init_drafter("fasteagle", target, num_layers=2, seed=2**32)


@pytest.mark.parametrize("fields", [{}, {"folder": "nowhere"}], ids=str)
def test_vocab_ids_without_a_draft_vocabulary_are_refused(target, fields):
    name = "draft_model" if fields else "prompt_lookup"
    with pytest.raises(ValueError, match="vocab_ids"):
        specjax.init_drafter(name, target, vocab_ids=[1, 2], **fields)
