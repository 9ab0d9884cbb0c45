"""FastEagle's own layout: an independent reader, round trips, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_drafters import cascade
from numpy_llama import forward as numpy_forward
from safetensors.numpy import load_file, save_file
from toys import toy_target

import specjax
from specjax.drafters import FastEagle
from specjax.interchange import export_drafter
from specjax.models.hf import save_target
from specjax.models.transformer import forward
from specjax.trained import TrainedDrafter

V = 40
TOKENS = np.random.default_rng(3).integers(0, V, 10)
WORDS = np.sort(np.random.default_rng(4).choice(V, 20, replace=False))
VARIANTS = {
    "fc2h": dict(candidates=3, draft_vocab_size=len(WORDS)),
    "wide_qkv": dict(entry="wide_qkv", intermediate_size=32, num_kv_heads=2),
    "sampled": dict(entry="sampled", partial_alignment=True, draft_depth=1),
}


@pytest.fixture(scope="module")
def target():
    return toy_target(vocab_size=V)


def cascade_of(target, **config) -> TrainedDrafter:
    """A cascade none of whose weights is at the 0 or 1 that would hide a missing or swapped one."""
    definition = FastEagle.of(target.config, dict(num_layers=2) | config)
    shapes = jax.eval_shape(definition.init, jax.random.key(0), target.params)
    rng = np.random.default_rng(1)

    def fill(w):
        if w.ndim == 1:
            return jnp.asarray(1 + 0.3 * rng.normal(size=w.shape), jnp.float32)
        return jnp.asarray(1.2 * w.shape[-1] ** -0.5 * rng.normal(size=w.shape), jnp.float32)

    params = jax.tree.map(fill, {k: v for k, v in shapes.items() if k != "buffers"})
    if definition.draft_vocab_size:
        params["buffers"] = {"vocab_ids": jnp.asarray(WORDS, jnp.int32)}
    return TrainedDrafter(definition, params, target.fingerprint)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(target, tmp_path, variant):
    drafter = cascade_of(target, **VARIANTS[variant])
    export_drafter(drafter, target, tmp_path / "one", "fasteagle", "a/b")
    loaded = specjax.load_drafter(tmp_path / "one", target)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(drafter.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, drafter.params)
    one, two = drafter.definition, loaded.definition
    same = "num_layers entry partial_alignment candidates draft_vocab_size nodes depth taps block"
    for field in same.split():
        assert getattr(one, field) == getattr(two, field), field
    export_drafter(loaded, target, tmp_path / "two", "fasteagle", "a/b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("variant", ["fc2h", "wide_qkv"])
def test_an_independent_reader_reads_out_the_same(target, tmp_path, variant):
    drafter = cascade_of(target, **VARIANTS[variant])
    export_drafter(drafter, target, tmp_path / "head", "fasteagle")
    loaded = specjax.load_drafter(tmp_path / "head", target)
    definition = loaded.definition

    @jax.jit
    def run(params, target_params):
        tokens = jnp.asarray(TOKENS)[None]
        taps = forward(target_params, target.config, tokens, taps=definition.taps).taps_BxTxM
        hidden, _ = definition.unroll(params, target_params, taps[:, :-1], tokens[:, 1:])
        last = jnp.concatenate([h[:, -1:] for h in hidden], axis=1)
        return definition.to_target_laws(params, definition.logits(params, target_params, last))[0]

    with jax.default_matmul_precision("highest"):
        logits = np.asarray(run(loaded.params, target.params))
    save_target(tmp_path / "target", target.config, target.params, "float32")
    raw = json.loads((tmp_path / "target" / "config.json").read_text())
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    _, entering = numpy_forward(raw, tensors, TOKENS[:-1])
    embed, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    expected = cascade(tmp_path / "head", embed, head, entering, TOKENS[1:])
    kept = np.isfinite(expected)
    assert (np.isfinite(logits) == kept).all()
    np.testing.assert_allclose(logits[kept], expected[kept], atol=1e-4)
    assert np.abs(np.diff(expected[:, kept[0]], axis=0)).max() > 0.1


def test_names_and_keys(target, tmp_path):
    export_drafter(cascade_of(target, **VARIANTS["fc2h"]), target, tmp_path, "fasteagle")
    D, F = 16, 24
    layer = {
        "self_attn.q_proj.weight": (16, D), "self_attn.k_proj.weight": (8, D),
        "self_attn.v_proj.weight": (8, D), "self_attn.o_proj.weight": (D, 16),
        "mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F), "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }  # fmt: skip
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: w.shape for name, w in tensors.items()} == {
        "fc.weight": (D, 3 * D), "fc_norm.0.weight": (D,), "fc_norm.1.weight": (D,),
        "fc_norm.2.weight": (D,), "norm.weight": (D,), "entry.weight": (D, 2 * D),
        "g_norm.weight": (D,), "e_norm.weight": (D,), "d2t": (len(WORDS),), "t2d": (V,),
    } | {f"layers.{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()}  # fmt: skip
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["speculators_model_type"] == raw["speculators_config"]["algorithm"] == "fasteagle"
    assert raw["transformer_layer_config"]["num_hidden_layers"] == 2
    assert raw["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert raw["target_fingerprint"] == target.fingerprint


def test_refusals_name_the_key(target, tmp_path):
    drafter = cascade_of(target)
    export_drafter(drafter, target, tmp_path / "head", "fasteagle")
    config, weights = (tmp_path / "head" / n for n in ("config.json", "model.safetensors"))
    raw, tensors = json.loads(config.read_text()), load_file(weights)

    def fails(word, record, tensors=tensors):
        config.write_text(json.dumps(record))
        save_file(tensors, weights)
        with pytest.raises(ValueError, match=word):
            specjax.load_drafter(tmp_path / "head", target)

    layer = raw["transformer_layer_config"]
    fails("fasteagle_version", raw | {"fasteagle_version": 2})
    fails("target_fingerprint", raw | {"target_fingerprint": "0"})
    fails("entry", raw | {"entry": "fc3h"})
    fails("partial_alignment", raw | {"partial_alignment": 1})
    fails("eagle_aux_hidden_state_layer_ids", raw | {"eagle_aux_hidden_state_layer_ids": None})
    fails("hidden_size", raw | {"transformer_layer_config": layer | {"hidden_size": 32}})
    fails("rope_theta", raw | {"transformer_layer_config": layer | {"rope_theta": 2e4}})
    fails("layers.2", raw | {"transformer_layer_config": layer | {"num_hidden_layers": 3}})
    fails("draft_depth", raw | {"transformer_layer_config": layer | {"num_hidden_layers": 1}})
    fails("lm_head.weight has no place", raw, tensors | {"lm_head.weight": tensors["fc.weight"]})
    less = {name: w for name, w in tensors.items() if name != "g_norm.weight"}
    fails("g_norm.weight is missing", raw, less)
    for format in ("eagle3", "speculators"):
        with pytest.raises(ValueError, match="family 'eagle3', not 'fasteagle'"):
            export_drafter(drafter, target, tmp_path / "out", format)
    other = specjax.init_drafter("prompt_lookup", target)
    with pytest.raises(ValueError, match="family 'fasteagle', not 'prompt_lookup'"):
        export_drafter(other, target, tmp_path / "out", "fasteagle")
    assert not (tmp_path / "out").exists()
