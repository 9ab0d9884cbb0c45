"""EAGLE-3 heads in other programs' layouts: against an independent reader, and every refusal."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy_drafters import draft_chain
from numpy_llama import forward as numpy_forward
from safetensors.numpy import load_file, save_file
from toys import toy_target, whole_prompt

import specjax
from specjax.drafters import Eagle3
from specjax.drafters.base import Committed, Context
from specjax.interchange import export_drafter
from specjax.models.hf import save_target
from specjax.models.transformer import forward, stack_layers
from specjax.trained import TrainedDrafter

V, D, F, L, STEPS = 40, 16, 24, 7, 3
TOKENS = np.random.default_rng(3).integers(0, V, 13)  # x_0 .. x_12
WORDS = np.random.default_rng(4).choice(V, 20, replace=False)  # draft vocabulary


def target_of(**changes):
    return toy_target(num_layers=L, vocab_size=V, **changes)


@pytest.fixture(scope="module")
def target():
    return target_of()


def head_of(target, seed=1, ids=WORDS, **config) -> TrainedDrafter:
    """A head none of whose weights is at the 0 or 1 that would hide a missing or swapped one."""
    definition = Eagle3.of(target.config, config)
    shapes = jax.eval_shape(definition.init, jax.random.key(0), target.params)
    rng = np.random.default_rng(seed)

    def fill(w):
        if w.ndim == 1:
            return jnp.asarray(1 + 0.3 * rng.normal(size=w.shape), jnp.float32)
        return jnp.asarray(1.2 * w.shape[-1] ** -0.5 * rng.normal(size=w.shape), jnp.float32)

    params = jax.tree.map(fill, {k: v for k, v in shapes.items() if k != "buffers"})
    if definition.draft_vocab_size:
        params["buffers"] = {"vocab_ids": jnp.asarray(np.sort(ids), jnp.int32)}
    return TrainedDrafter(definition, params, target.fingerprint)


def drafted(loaded, target):
    """(logits over the target's vocabulary, tokens) of the chain drafted after TOKENS[:-1]."""
    fields = {f.name: getattr(loaded.definition, f.name) for f in dataclasses.fields(Eagle3)}
    seen = []

    class Recording(Eagle3):
        def logits(self, params, target_params, hidden):
            seen.append(super().logits(params, target_params, hidden))
            return seen[-1]

    definition = Recording(**fields | {"draft_depth": STEPS})

    @jax.jit
    def run(params, target_params):
        tokens = jnp.asarray(TOKENS)[None]
        taps = forward(target_params, target.config, tokens, taps=definition.taps).taps_BxTxM
        rows = len(TOKENS) - 1
        state = definition.init_state(1, rows + 8, jnp.float32)
        committed = Committed(tokens[:, 1:], taps[:, :-1], jnp.array([rows]))
        state = definition.prefill(params, target_params, state, committed, whole_prompt(committed))
        context = Context(tokens, jnp.array([rows + 1]))
        tree, _ = definition.draft(params, target_params, state, context, None)
        laws = definition.to_target_laws(params, jnp.concatenate(seen, axis=1))
        return laws[0], tree.tokens_T[0, 1:]

    with jax.default_matmul_precision("highest"):
        return jax.device_get(run(loaded.params, stack_layers(target.params)))


def read_independently(folder, target, tmp_path):
    """The same by NumPy, from the files of the head and of the target."""
    save_target(tmp_path / "target", target.config, target.params, "float32")
    raw = json.loads((tmp_path / "target" / "config.json").read_text())
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    _, entering = numpy_forward(raw, tensors, TOKENS[:-1])
    embed = tensors["model.embed_tokens.weight"]
    return draft_chain(folder, embed, entering, TOKENS[1:], STEPS)


def released(folder, target):
    """A head as first released: written from the published table of names, not by our writer.

    No feature norm, no layer numbers, RoPE at 10000 whatever the target's, its own count of heads.
    """
    q, kv, W = 4 * 8, 4 * 8, len(WORDS)
    shapes = {
        "fc.weight": (D, 3 * D), "lm_head.weight": (W, D), "norm.weight": (D,),
        "midlayer.hidden_norm.weight": (D,), "midlayer.input_layernorm.weight": (D,),
        "midlayer.post_attention_layernorm.weight": (D,),
        "midlayer.self_attn.q_proj.weight": (q, 2 * D),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * D),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * D),
        "midlayer.self_attn.o_proj.weight": (D, q), "midlayer.mlp.gate_proj.weight": (F, D),
        "midlayer.mlp.up_proj.weight": (F, D), "midlayer.mlp.down_proj.weight": (D, F),
    }  # fmt: skip
    rng = np.random.default_rng(7)
    tensors = {}
    for name, shape in shapes.items():
        w = rng.normal(size=shape) * 1.2 * shape[-1] ** -0.5
        w = 1 + 0.3 * rng.normal(size=shape) if len(shape) == 1 else w
        tensors[name] = w.astype(ml_dtypes.bfloat16)
    tensors["d2t"] = np.sort(WORDS) - np.arange(W)
    tensors["t2d"] = np.isin(np.arange(V), WORDS)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "hidden_size": D, "head_dim": 8,
        "initializer_range": 0.02, "intermediate_size": F, "max_position_embeddings": 2048,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 40,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16",
        "use_cache": True, "vocab_size": V, "draft_vocab_size": W,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# ---- the same drafts -----------------------------------------------------------------------------

QWEN3 = dict(model_type="qwen3", qk_norm=True, rms_norm_eps=1e-6)
ROPE = dict(rope_theta=500000.0)
CASES = {
    "eagle3": ("eagle3", {}, dict(fc_norm=False, intermediate_size=24)),
    "eagle3-variants": (
        "eagle3",
        ROPE,
        dict(norm_before_residual=True, norm_output=True, draft_vocab_size=len(WORDS)),
    ),
    "speculators": (
        "speculators",
        ROPE,
        dict(draft_vocab_size=len(WORDS), norm_before_residual=True, feature_layers=(0, 3, 6)),
    ),
    "speculators-qwen3": ("speculators", QWEN3, dict(norm_output=True, fc_norm=False)),
    "released": ("released", ROPE, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_independent_reader_drafts_the_same(case, tmp_path):
    format, changes, config = CASES[case]
    target = target_of(**changes)
    if format == "released":
        folder = released(tmp_path / "head", target)
    else:
        folder = tmp_path / "head"
        export_drafter(head_of(target, **config), target, folder, format)
    loaded = specjax.load_drafter(folder, target)
    logits, tokens = drafted(loaded, target)
    expected, chain = read_independently(folder, target, tmp_path)
    assert tokens.tolist() == chain
    assert (np.isneginf(logits) == np.isneginf(expected)).all()
    kept = np.isfinite(expected)
    assert kept.sum() == STEPS * (len(WORDS) if loaded.definition.draft_vocab_size else V)
    np.testing.assert_allclose(logits[kept], expected[kept], atol=1e-4)
    steps = expected[:, np.isfinite(expected[0])]
    assert np.abs(np.diff(steps, axis=0)).max(axis=1).min() > 0.1  # every step says something else


# ---- names, shapes, keys -------------------------------------------------------------------------

BOTH = ("eagle3", "speculators")
FULL = dict(draft_vocab_size=len(WORDS))


def written(target, folder, format, dtype="float32", verifier=None, **config):
    """(the drafter, its file's tensors, its config)."""
    head = head_of(target, **config)
    export_drafter(head, target, folder, format, verifier, dtype)
    raw = json.loads((folder / "config.json").read_text())
    return head, load_file(folder / "model.safetensors"), raw


@pytest.mark.parametrize("format", BOTH)
def test_names_shapes_and_types(target, tmp_path, format):
    _, tensors, _ = written(target, tmp_path / "out", format, fc_norm=False, **FULL)
    W, q, kv = len(WORDS), 2 * 8, 8
    layer = {
        "self_attn.q_proj.weight": (q, 2 * D), "self_attn.k_proj.weight": (kv, 2 * D),
        "self_attn.v_proj.weight": (kv, 2 * D), "self_attn.o_proj.weight": (D, q),
        "mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F), "hidden_norm.weight": (D,),
        "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
    }  # fmt: skip
    prefix = "midlayer." if format == "eagle3" else "layers.0."
    shapes = {prefix + name: shape for name, shape in layer.items()} | {
        "fc.weight": (D, 3 * D), "norm.weight": (D,), "lm_head.weight": (W, D), "d2t": (W,),
        "t2d": (V,),
    }  # fmt: skip
    assert len(shapes) == 15
    if format == "speculators":
        shapes["embed_tokens.weight"] = (V, D)
        np.testing.assert_array_equal(tensors["embed_tokens.weight"], target.params["embed"])
    assert {name: w.shape for name, w in tensors.items()} == shapes
    types = {name: w.dtype.name for name, w in tensors.items()}
    assert types.pop("d2t") == "int64" and types.pop("t2d") == "bool"
    assert set(types.values()) == {"float32"}
    assert (np.sort(WORDS) == np.arange(W) + tensors["d2t"]).all()
    assert np.flatnonzero(tensors["t2d"]).tolist() == np.sort(WORDS).tolist()


@pytest.mark.parametrize("format", BOTH)
def test_a_whole_vocabulary_has_no_mapping_and_norms_are_counted(target, tmp_path, format):
    _, tensors, raw = written(target, tmp_path / "out", format)
    assert not {"d2t", "t2d"} & set(tensors) and raw["draft_vocab_size"] == V
    assert raw["fc_norm"] is True
    assert sorted(n for n in tensors if "fc_norm" in n) == [f"fc_norm.{i}.weight" for i in range(3)]


def test_keys_of_the_flat_config(tmp_path):
    target = target_of(rope_theta=5e5, max_position_embeddings=512, eos_token_ids=(3, 4))
    config = FULL | dict(fc_norm=False, intermediate_size=32)
    _, _, raw = written(target, tmp_path / "out", "eagle3", "bfloat16", **config)
    assert raw == {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": D,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "rope_scaling": None, "attention_bias": False,
        "tie_word_embeddings": False, "max_position_embeddings": 512, "bos_token_id": None,
        "eos_token_id": [3, 4], "torch_dtype": "bfloat16", "vocab_size": V,
        "draft_vocab_size": len(WORDS), "eagle_aux_hidden_state_layer_ids": [2, 3, 4],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True,
        },
    }  # fmt: skip


def test_keys_of_the_nested_config(tmp_path):
    target = target_of(**QWEN3)
    config = FULL | dict(norm_output=True, draft_depth=5, feature_layers=(0, 2, 6))
    _, _, raw = written(target, tmp_path / "out", "speculators", verifier="a/b-1.5", **config)
    assert raw.pop("transformer_layer_config") == {
        "model_type": "qwen3", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": None, "attention_bias": False,
        "max_position_embeddings": 256, "vocab_size": V,
    }  # fmt: skip
    assert raw.pop("speculators_config") == {
        "algorithm": "eagle3", "default_proposal_method": "greedy",
        "proposal_methods": [
            {
                "proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            }
        ],
        "verifier": {"name_or_path": "a/b-1.5", "architectures": ["Qwen3ForCausalLM"]},
    }  # fmt: skip
    assert raw.pop("speculators_version").count(".") >= 2
    assert raw == {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
        "draft_vocab_size": len(WORDS), "norm_before_residual": False, "norm_before_fc": False,
        "fc_norm": True, "norm_output": True, "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [0, 2, 6], "embed_requires_grad": False,
        "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip


# ---- round trips ---------------------------------------------------------------------------------

VARIANTS = {
    "plain": dict(fc_norm=False),
    "all": FULL
    | dict(norm_before_residual=True, norm_output=True, intermediate_size=32, num_kv_heads=2),
    "whole-vocabulary": dict(draft_vocab_size=V),
}
GEOMETRY = (
    "model_type hidden_size intermediate_size num_heads num_kv_heads head_dim rms_norm_eps "
    "rope_theta rope_scaling qkv_bias o_bias qk_norm vocab_size".split()
)


def assert_same_head(a, b):
    """Bit for bit the same parameters, and whatever of the definition decides its logits."""
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert jax.tree.map(lambda w: w.dtype, a.params) == jax.tree.map(lambda w: w.dtype, b.params)
    one, two = a.definition, b.definition
    for field in ("fc_norm", "norm_before_residual", "norm_output", "draft_vocab_size", "taps"):
        assert getattr(one, field) == getattr(two, field), field
    for field in GEOMETRY:
        assert getattr(one.block, field) == getattr(two.block, field), field


@pytest.mark.parametrize("format", BOTH)
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(target, tmp_path, format, variant):
    config = VARIANTS[variant]
    ids = WORDS if config.get("draft_vocab_size") == len(WORDS) else np.arange(V)
    head = head_of(target, ids=ids, **config)
    export_drafter(head, target, tmp_path / "one", format)
    loaded = specjax.load_drafter(tmp_path / "one", target)
    assert_same_head(head, loaded)
    like = jax.eval_shape(loaded.definition.init, jax.random.key(0), target.params)
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, loaded.params)
    # Through each of the other formats and back, byte for byte.
    other = {"eagle3": "speculators", "speculators": "specjax"}[format]
    export_drafter(loaded, target, tmp_path / "two", other)
    again = specjax.load_drafter(tmp_path / "two", target)
    assert_same_head(head, again)
    export_drafter(again, target, tmp_path / "three", format)
    for name in ("model.safetensors", "config.json"):
        first, last = ((tmp_path / n / name).read_bytes() for n in ("one", "three"))
        assert first == last, name


def test_the_depth_survives_where_the_format_has_a_key_for_it(target, tmp_path):
    head = head_of(target, steps=4, draft_depth=3)
    export_drafter(head, target, tmp_path / "out", "speculators")
    assert specjax.load_drafter(tmp_path / "out", target).definition.depth == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_rounded_once(target, tmp_path, dtype):
    head, tensors, raw = written(target, tmp_path / "one", "speculators", dtype, **FULL)
    assert {w.dtype.name for n, w in tensors.items() if n not in ("d2t", "t2d")} == {dtype}
    assert raw["torch_dtype"] == dtype
    loaded = specjax.load_drafter(tmp_path / "one", target)  # float32 target, narrow embedding
    expected = jax.tree.map(
        lambda w: w if w.dtype == jnp.int32 else w.astype(dtype).astype(jnp.float32), head.params
    )
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    export_drafter(loaded, target, tmp_path / "two", "speculators", None, dtype)
    first, last = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert first == last


def test_a_mask_may_be_missing_and_a_released_head_is_what_it_says(target, tmp_path):
    folder = released(tmp_path / "head", target)
    before = specjax.load_drafter(folder, target)
    block = before.definition.block
    assert (block.rope_theta, block.num_heads, block.num_kv_heads) == (10000.0, 4, 4)
    assert before.definition.taps == (2, 3, 4) and not before.definition.fc_norm
    tensors = load_file(folder / "model.safetensors")
    del tensors["t2d"]
    save_file(tensors, folder / "model.safetensors")
    assert_same_head(before, specjax.load_drafter(folder, target))


def test_a_sharded_folder_loads(target, tmp_path):
    head, tensors, _ = written(target, tmp_path, "eagle3", **FULL)
    names = sorted(tensors)
    shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for shard, held in shards.items():
        save_file({n: tensors[n] for n in held}, tmp_path / shard)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {n: shard for shard, held in shards.items() for n in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_head(head, specjax.load_drafter(tmp_path, target))


# ---- numbers of layers ---------------------------------------------------------------------------

IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    "entered, nested, taps",
    [
        (None, None, (2, 3, 4)),  # the default
        (None, [1, 4, 5], (2, 5, 6)),  # 1 first: numbers of layers left
        (None, [2, 3, 4], (2, 3, 4)),  # the default as numbers of layers entered
        ([2, 4, 6], None, (2, 4, 6)),
        ([0, 3, 6], None, (0, 3, 6)),
        ([2, 4, 7], None, "7 layers"),  # before the final norm there, after it here
        ([2, 5, 6], [1, 4, 5], (2, 5, 6)),
        ([3, 4, 6], [2, 3, 5], (3, 4, 6)),
        ([3, 4, 6], [3, 4, 6], (3, 4, 6)),
        (None, [3, 4, 5], "eagle_config"),  # either
        (None, [2, 3, 5], "eagle_config"),
        ([2, 4, 6], [1, 2, 3], "contradicts"),
        ([1, 4, 5], [1, 4, 5], "contradicts"),
        ([2, 4, 8], None, "7 layers"),
        ([4, 3, 2], None, "low to high"),
        ([2, 3], None, "three"),
        ([2, 3, 4, 6], None, "three"),
        ("2,3,4", None, "three"),
    ],
)
def test_numbers_of_layers_in_the_flat_config(target, tmp_path, entered, nested, taps):
    folder = released(tmp_path / "head", target)
    raw = json.loads((folder / "config.json").read_text())
    if entered is not None:
        raw[IDS] = entered
    if nested is not None:
        raw["eagle_config"] = {IDS: nested}
    (folder / "config.json").write_text(json.dumps(raw))
    if isinstance(taps, tuple):
        assert specjax.load_drafter(folder, target).definition.taps == taps
    else:
        fails(folder, target, IDS, taps)


def test_a_shallow_target_has_no_default(tmp_path):
    target = toy_target(num_layers=4, vocab_size=V)
    fails(released(tmp_path / "head", target), target, IDS, "4 layers")


# ---- refusals ------------------------------------------------------------------------------------


def fails(folder, target, *words, error=ValueError):
    with pytest.raises(error) as caught:
        specjax.load_drafter(folder, target)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.fixture(scope="module")
def good(target, tmp_path_factory):
    """A folder in each layout."""
    folder = tmp_path_factory.mktemp("good")
    for format in BOTH:
        export_drafter(head_of(target, **FULL), target, folder / format, format)
    return folder


@pytest.fixture(params=BOTH)
def folder(good, tmp_path, request):
    """A copy to be damaged."""
    return shutil.copytree(good / request.param, tmp_path / "head")


def rewrite(folder, changes):
    """Changes keys of the config, those of the layer where it keeps them; ... takes one away."""
    raw = json.loads((folder / "config.json").read_text())
    nested = raw.get("transformer_layer_config", raw)
    for key, value in changes.items():
        section = nested if key in nested or key not in raw and key in LAYER_KEYS else raw
        section[key] = value
        if value is ...:
            del section[key]
    (folder / "config.json").write_text(json.dumps(raw))


LAYER_KEYS = ("mlp_bias", "layer_types", "use_sliding_window", "quantization_config")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": 32}, ["hidden_size", "32", "16"]),
        ({"vocab_size": 41}, ["vocab_size", "41", "40"]),
        ({"target_hidden_size": 64}, ["target_hidden_size", "64", "width of its own"]),
        ({"norm_before_fc": True}, ["norm_before_fc"]),
        ({"norm_output": "yes"}, ["norm_output", "'yes'"]),
        ({"norm_before_residual": 1}, ["norm_before_residual"]),
        ({"fc_norm": False}, ["fc_norm.0.weight", "no place"]),
        ({"logit_scale": 0.5}, ["logit_scale"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ({"parallel_drafting": True}, ["parallel_drafting"]),
        ({"hidden_act": "gelu"}, ["hidden_act"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"attention_bias": True}, ["q_proj.bias", "missing"]),
        ({"layer_types": ["sliding_attention"]}, ["layer_types"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["rope_type", "yarn"]),
        ({"intermediate_size": 25}, ["mlp.gate_proj.weight", "(24, 16)", "(25, 16)"]),
        ({"num_attention_heads": ...}, ["num_attention_heads", "missing"]),
        ({"model_type": "gpt2"}, ["model_type", "gpt2"]),
        ({"draft_vocab_size": 19}, ["d2t", "(20,)", "(19,)"]),
        ({"draft_vocab_size": 41}, ["draft_vocab_size", "41"]),
        ({"draft_vocab_size": 0}, ["draft_vocab_size"]),
        ({"draft_vocab_size": ...}, ["d2t", "(20,)", "(40,)"]),
    ],
)
def test_what_a_config_cannot_say_is_named(folder, target, changes, words):
    assert specjax.load_drafter(folder, target).name == "eagle3"
    rewrite(folder, changes)
    fails(folder, target, *words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_hidden_layers": 2}, ["transformer_layer_config.num_hidden_layers", "2"]),
        ({"norm_before_residual": ...}, ["norm_before_residual", "missing"]),
        ({"speculators_model_type": "peagle"}, ["speculators_model_type", "peagle"]),
        ({"transformer_layer_config": [1]}, ["transformer_layer_config"]),
        ({"speculators_config": {"proposal_methods": 3}}, ["proposal_methods"]),
        (
            {"speculators_config": {"proposal_methods": [{"speculative_tokens": 0}]}},
            ["speculative_tokens"],
        ),
    ],
)
def test_what_the_nested_config_cannot_say_is_named(good, target, tmp_path, changes, words):
    folder = shutil.copytree(good / "speculators", tmp_path / "head")
    raw = json.loads((folder / "config.json").read_text())
    if "num_hidden_layers" in changes:
        raw["transformer_layer_config"] |= changes
    else:
        raw = {k: v for k, v in (raw | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    fails(folder, target, *words)


def test_features_of_the_last_layer_alone_are_refused(good, target, tmp_path):
    folder = shutil.copytree(good / "eagle3", tmp_path / "head")
    rewrite(folder, {"eagle_config": {"use_aux_hidden_state": False}})
    fails(folder, target, "eagle_config.use_aux_hidden_state")


def test_tensors_that_do_not_fit_are_named(folder, target):
    prefix = "midlayer." if folder_of(folder) == "eagle3" else "layers.0."
    tensors = load_file(folder / "model.safetensors")
    ids = np.sort(WORDS)
    for name, w, *words in (
        ("lm_head.weight", None, "lm_head.weight is missing"),
        (f"{prefix}hidden_norm.weight", None, "hidden_norm.weight is missing"),
        ("fc_norm.1.weight", None, "fc_norm.1.weight is missing"),
        ("layers.1.mlp.up_proj.weight", np.ones((2, 2), np.float32), "layers.1.mlp", "no place"),
        ("fc.bias", np.ones(D, np.float32), "fc.bias", "no place"),
        ("fc.weight", np.ones((D, 2 * D), np.float32), "fc.weight", "(16, 32)", "(16, 48)"),
        ("norm.weight", np.ones(D, np.int8), "norm.weight", "int8"),
        ("d2t", None, "draft_vocab_size", "d2t"),
        ("d2t", ids, "d2t does not hold offsets"),  # ids in place of offsets
        ("d2t", np.zeros(len(ids), np.int64), "d2t and t2d"),
        ("d2t", tensors["d2t"] + 1, "d2t"),
        ("t2d", ~tensors["t2d"], "d2t and t2d"),
        ("embed_tokens.weight", np.ones((V, D), np.float32), "embed_tokens.weight is not"),
    ):
        changed = {n: v for n, v in (tensors | {name: w}).items() if v is not None}
        save_file(changed, folder / "model.safetensors")
        fails(folder, target, *words)


def folder_of(folder):
    raw = json.loads((folder / "config.json").read_text())
    return "speculators" if "speculators_model_type" in raw else "eagle3"


def test_the_embedding_tells_targets_apart(good, target):
    """Nothing else in a folder does: same geometry, other weights."""
    fails(good / "speculators", target_of(seed=5), "embed_tokens.weight")
    assert specjax.load_drafter(good / "eagle3", target_of(seed=5)).name == "eagle3"


def test_truncated_and_incomplete_folders(folder, target):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for keep in (0, 9, len(data) // 3, len(data) - 1):
        weights.write_bytes(data[:keep])
        fails(folder, target, "model.safetensors", "truncated")
    weights.unlink()
    fails(folder, target, "model.safetensors", "missing", error=FileNotFoundError)
    (folder / "config.json").unlink()
    fails(folder, target, "config.json", "missing", error=FileNotFoundError)


def test_pickles_are_refused_with_the_way_out(folder, target, tmp_path):
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "executed"
    # A pickle that would leave a trace if anything unpickled it.
    (folder / "pytorch_model.bin").write_bytes(f"cpathlib\nPath.touch\n(V{marker}\ntR.".encode())
    words = "pytorch_model.bin", "never loaded", "weights_only=True", "save_file"
    fails(folder, target, *words, error=FileNotFoundError)
    assert not marker.exists()


def test_a_language_model_is_no_head(target, tmp_path):
    save_target(tmp_path, target.config, target.params)
    fails(tmp_path, target, "midlayer.", "draft_model")


# ---- what cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "format, changes, config, word",
    [
        ("eagle3", QWEN3, {}, "own_layer"),
        ("speculators", dict(model_type="qwen2", qkv_bias=True), {}, "own_layer"),
        ("eagle3", dict(qkv_bias=True, o_bias=True), {}, "own_layer"),
        ("eagle3", {}, dict(feature_layers=(1, 3, 5)), "feature_layers"),
        ("eagle3", {}, dict(feature_layers=(0, 3, 5)), "feature_layers"),
        ("speculators", {}, dict(feature_layers=(0, 3)), "feature_layers"),
        ("speculators", {}, dict(feature_layers=(2, 3, 7)), "feature_layers"),
        ("fasteagle", {}, {}, "family 'fasteagle'"),
        ("onnx", {}, {}, "format"),
    ],
)
def test_refused_exports_write_nothing(tmp_path, format, changes, config, word):
    target = target_of(**changes)
    with pytest.raises(ValueError, match=word):
        export_drafter(head_of(target, **config), target, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_a_llama_head_serves_a_target_of_another_family(tmp_path):
    target = target_of(**QWEN3)
    layer = target.config.replace(model_type="llama", qk_norm=False, num_layers=1)
    head = head_of(target, own_layer=layer)
    export_drafter(head, target, tmp_path / "out", "eagle3")
    assert_same_head(head, specjax.load_drafter(tmp_path / "out", target))


def test_other_arguments_are_checked_before_anything_is_written(target, tmp_path):
    head, out = head_of(target), tmp_path / "out"
    for match, arguments in (
        ("dtype", (target, out, "eagle3", None, "int8")),
        ("verifier", (target, out, "speculators", "/models/secret")),
        ("verifier", (target, out, "speculators", "./a")),
        ("verifier", (target, out, "eagle3", "a/b")),
        ("dtype", (target, out, "specjax", None, "bfloat16")),
        ("another target", (target_of(seed=5), out, "eagle3")),
    ):
        with pytest.raises(ValueError, match=match):
            export_drafter(head, *arguments)
        assert not out.exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    for format in ("specjax", *BOTH):
        with pytest.raises(FileExistsError, match="kept"):
            export_drafter(head, target, tmp_path / "kept", format)
        with pytest.raises(FileExistsError, match="file"):
            export_drafter(head, target, tmp_path / "kept" / "file", format)
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["file"]
    export_drafter(head, target, tmp_path / "kept" / ".." / "empty", "eagle3")


def test_an_own_layer_of_another_width_is_refused(target):
    with pytest.raises(ValueError, match="own_layer.*hidden_size"):
        Eagle3(target.config, own_layer=target.config.replace(hidden_size=24))
