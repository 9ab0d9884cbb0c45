"""Hugging Face folders: real checkpoints, round trips, and every way a folder can be wrong."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from families import FAMILIES, weights, write_folder
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from specjax.data.tokenizer import save_tokenizer, train_bpe
from specjax.models.checkpoint import Checkpoint
from specjax.models.config import config_to_hf, read_config
from specjax.models.hf import load_params, save_target
from specjax.models.target import load_target
from specjax.models.transformer import forward, logits_of

# ---- real checkpoints ----------------------------------------------------------------------------

REAL = {"stories260K": "stories260K/hf_derived", "tinystories-656K": "tinystories-656K"}


@pytest.fixture(scope="module", params=REAL)
def real(request, shared_models):
    """(target, golden values) of one real checkpoint."""
    golden = json.loads((shared_models / request.param / "golden_numpy.json").read_text())
    return load_target(str(shared_models / REAL[request.param])), golden


def test_real_checkpoint_tokenises(real):
    target, golden = real
    assert target.num_params == golden["params"]
    assert target.tokenizer(golden["prompt"])["input_ids"] == golden["prompt_ids"]
    text = target.tokenizer.decode(golden["greedy_ids"], skip_special_tokens=True)
    assert text.strip() == golden["greedy_text"].strip()


def test_real_checkpoint_reproduces_goldens(real):
    target, golden = real
    ids, prompt = golden["greedy_ids"], len(golden["prompt_ids"])
    logits = np.asarray(target.logits([ids]))[0]
    token_ids, values = zip(*golden["prompt_last_logits_top5"], strict=True)
    best = np.argsort(-logits[prompt - 1])[:5]
    assert best.tolist() == list(token_ids)
    np.testing.assert_allclose(logits[prompt - 1][best], values, atol=1e-4)
    # Teacher forcing the greedy text decides it token for token, by induction.
    assert logits.argmax(-1)[prompt - 1 : -1].tolist() == ids[prompt:]


def test_real_checkpoint_reproduces_bits_per_byte(real, shared_models):
    file = shared_models.parent / "corpora" / "tinystories" / "tinystories_1000.json"
    if not file.is_file():
        pytest.skip("shared corpora are not here")
    target, golden = real
    config, tokenizer = target.config, target.tokenizer
    rows = tokenizer(json.loads(file.read_text())[:50])["input_ids"]
    rows = [row[: config.max_position_embeddings] for row in rows]

    @jax.jit
    def nats(params, tokens_T, count):
        hidden = forward(params, config, tokens_T[None]).hidden_BxTxD
        law_TxV = jax.nn.log_softmax(logits_of(params, hidden)[0, :-1])
        each = -jnp.take_along_axis(law_TxV, tokens_T[1:, None], axis=1)[:, 0]
        return jnp.sum(jnp.where(jnp.arange(1, tokens_T.size) < count, each, 0.0))

    total = scored = size = 0
    for row in rows:
        padded = row + [0] * (config.max_position_embeddings - len(row))
        total += float(nats(target.params, jnp.array(padded), len(row)))
        scored += len(row) - 1
        size += len(tokenizer.backend_tokenizer.decode(row).encode())
    assert scored == golden["tinystories_first50_tokens"]
    assert total / scored == pytest.approx(golden["tinystories_first50_nll_per_token"], abs=2e-5)
    bits = total / np.log(2) / size
    assert bits == pytest.approx(golden["tinystories_first50_bits_per_byte"], abs=2e-5)


# ---- round trips ---------------------------------------------------------------------------------


def assert_same(a, b):
    """Equal trees of equal arrays and dtypes."""
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


@pytest.mark.parametrize(
    "family", ["llama2", "llama3.2", "llama-bias", "mistral", "qwen2", "qwen3"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load_round_trip(family, dtype, tmp_path):
    raw = FAMILIES[family]
    tensors = weights(raw)
    config = read_config(write_folder(tmp_path / "first", raw, tensors))
    params = load_params(tmp_path / "first", config)
    save_target(tmp_path / "second", config, params, dtype)
    assert read_config(tmp_path / "second") == config
    cast = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
    assert_same(
        load_params(tmp_path / "second", config), jax.tree.map(lambda w: w.astype(cast), params)
    )
    # Name for name and bit for bit the checkpoint it came from.
    assert_same(
        load_file(tmp_path / "second" / "model.safetensors"),
        {name: w.astype(cast) for name, w in tensors.items()},
    )


def test_every_config_survives_a_round_trip(tmp_path):
    for family, raw in FAMILIES.items():
        (tmp_path / "config.json").write_text(json.dumps(raw))
        config = read_config(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
        assert read_config(tmp_path) == config, family


def test_saving_refuses_what_the_architecture_cannot_say(tmp_path):
    raw = FAMILIES["qwen3"]
    config = read_config(write_folder(tmp_path / "first", raw, weights(raw)))
    params = load_params(tmp_path / "first", config)
    with pytest.raises(ValueError, match="qk_norm"):
        save_target(tmp_path / "second", config.replace(model_type="llama"), params)
    with pytest.raises(ValueError, match="o_bias"):
        biased = config.replace(model_type="mistral", qk_norm=False, qkv_bias=True, o_bias=True)
        save_target(tmp_path / "second", biased, params)
    assert not (tmp_path / "second").exists()


def test_tied_matrix_under_either_name(tmp_path):
    raw = FAMILIES["llama2-tied"]
    tensors = weights(raw)
    config = read_config(write_folder(tmp_path / "embed", raw, tensors))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_folder(tmp_path / "head", raw, tensors)
    assert_same(load_params(tmp_path / "head", config), load_params(tmp_path / "embed", config))


def test_stop_tokens_come_from_both_config_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llama3.1"]))
    assert read_config(tmp_path).eos_token_ids == (2, 3, 5)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 9]}))
    assert read_config(tmp_path).eos_token_ids == (2, 3, 5, 9)


def test_dtype_of_loaded_weights(folder):
    for dtype in ("float32", "bfloat16"):
        params = load_target(str(folder), dtype=dtype).params
        assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    stacked = load_target(str(folder), scan_layers=True).params
    assert stacked["layers"]["attn"]["o"].shape[0] == RAW["num_hidden_layers"]
    with pytest.raises(ValueError, match="dtype.*float16"):
        load_target(str(folder), dtype="float16")


# ---- bad input: each message names the file or the field -----------------------------------------

RAW = FAMILIES["llama3"] | {"vocab_size": 300, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A whole folder, tokenizer included, in three shards."""
    folder = tmp_path_factory.mktemp("good")
    write_folder(folder, RAW, weights(RAW), shards=3)
    tokenizer = train_bpe(["aaaa bbbb abab " * 9], 262)
    save_tokenizer(tokenizer, folder, model_max_length=64)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(good, tmp_path / "model")


def rewrite(folder, **changes):
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def fails(folder, *words, error=ValueError):
    """Loading raises `error` with every word in its message."""
    with pytest.raises(error) as caught:
        load_target(str(folder))
    for word in words:
        assert word in str(caught.value)


def shard_of(folder, tensor):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def test_the_undamaged_folder_loads(folder):
    assert load_target(str(folder)).config.vocab_size == 300


def test_a_target_is_called_what_it_was_asked_for_by(folder, monkeypatch):
    import huggingface_hub

    assert load_target(str(folder)).name == folder.name
    monkeypatch.chdir(folder)
    assert load_target(".").name == folder.name
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert load_target(str(link)).name == "link"
    # The hub's cache holds a model under the name of a commit.
    commit = folder.rename(folder.with_name("1d4c9a"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(commit))
    assert load_target("org/model").name == "org/model"


def test_missing_folder(tmp_path):
    fails(tmp_path / "nowhere", "nowhere", "no such folder", error=FileNotFoundError)


def test_missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    words = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
    fails(folder, *words, error=FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 5, 0.3, 0.999])
def test_truncated_shard(folder, keep):
    shard = folder / "model-00003-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    fails(folder, shard.name, "truncated")


def test_damaged_index(folder):
    index = folder / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        fails(folder, index.name, "not")


def test_missing_tensor(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    fails(folder, name, "missing")


@pytest.fixture
def unread(monkeypatch):
    """Fails the test where a weight is read."""
    monkeypatch.setattr(Checkpoint, "read", lambda *_, **__: pytest.fail("a weight was read"))


def reindex(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


LAST = "model.norm.weight"  # read last: what it lacks must show before that


def test_an_index_that_lacks_a_tensor(folder, unread):
    reindex(folder, lambda where: where.pop(LAST))
    fails(folder, "model.safetensors.index.json", LAST, "missing")


def test_an_index_that_names_what_its_shard_lacks(folder, unread):
    others = {p.name for p in folder.glob("model-*")} - {shard_of(folder, LAST).name}
    wrong = sorted(others)[0]
    reindex(folder, lambda where: where.update({LAST: wrong}))
    fails(folder, wrong, LAST, "missing", "model.safetensors.index.json")


def test_a_tensor_in_no_shard(folder, unread):
    rewrite(folder, num_hidden_layers=2)
    fails(folder, "model.safetensors.index.json", "model.layers.1.", "missing")


def test_an_index_that_names_a_shard_which_is_not_there(folder, unread):
    reindex(folder, lambda where: where.update({LAST: "model-00004-of-00003.safetensors"}))
    words = "model-00004-of-00003.safetensors", "model.safetensors.index.json"
    fails(folder, *words, error=FileNotFoundError)


def test_sizes_that_disagree(folder, unread):
    shard = shard_of(folder, LAST)
    save_file(load_file(shard) | {LAST: np.zeros(31, np.float32)}, shard)
    fails(folder, shard.name, LAST, "(31,)", "(32,)")


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"],
)
def test_shape_mismatch(folder, name):
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    tensors[name] = np.concatenate([tensors[name], tensors[name]])
    save_file(tensors, shard)
    fails(folder, shard.name, name, str(tensors[name].shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_number_that_is_not_finite(folder, dtype, value):
    name = "model.layers.0.mlp.up_proj.weight"
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    tensors[name] = tensors[name].astype(dtype)
    tensors[name][-1, -1] = value
    save_file(tensors, shard)
    fails(folder, shard.name, name, "NaN or infinity")


def test_a_slice_is_answerable_for_itself(tmp_path):
    """Sharded loading reads slices; each is looked at, to its very end, and nothing beside it."""
    table = np.zeros((3, 70_000), np.float32)
    table[2, -1] = np.nan
    save_file({"table": table}, tmp_path / "model.safetensors")
    read = lambda *rows: Checkpoint(tmp_path).read(  # noqa: E731
        "table", table.shape, index=(slice(*rows), slice(0, 70_000))
    )
    np.testing.assert_array_equal(read(0, 2), 0)
    with pytest.raises(ValueError, match="model.safetensors: table holds NaN"):
        read(2, 3)


def test_quantised_tensor(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, shard)
    fails(folder, shard.name, name, "int8")


def test_config_of_another_geometry(folder):
    rewrite(folder, intermediate_size=50)
    fails(folder, "mlp.gate_proj.weight", "(48, 32)", "(50, 32)")
    rewrite(folder, intermediate_size=48, num_hidden_layers=2)
    fails(folder, "model.layers.1.input_layernorm.weight")


def test_missing_config(folder):
    (folder / "config.json").unlink()
    fails(folder, "config.json", "missing", error=FileNotFoundError)


@pytest.mark.parametrize("data", [b"", b"{", b"not json", b"[1]", b"3", b"\xff\xfe{}"])
def test_config_that_is_not_json(folder, data):
    (folder / "config.json").write_bytes(data)
    fails(folder, "config.json", "not")


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff"])
def test_generation_config_that_is_not_json(folder, data):
    (folder / "generation_config.json").write_bytes(data)
    fails(folder, "generation_config.json", "not")


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2'"),
        ({"model_type": ...}, "model_type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic'"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope_scaling.factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window"),
        ({"model_type": "mistral"}, "sliding_window"),  # absent means 4096
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": ...}, "hidden_size: missing"),
        ({"num_hidden_layers": ...}, "num_hidden_layers: missing"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
    ],
)
def test_unsupported_or_broken_config(folder, changes, word):
    rewrite(folder, **changes)
    fails(folder, "config.json", word)


def test_tokenizer_larger_than_the_embedding(folder):
    rewrite(folder, vocab_size=260)
    fails(folder, "tokenizer.json", "vocab_size 260")


@pytest.mark.parametrize("data", [None, b"{", b'{"model": 3}'])
def test_broken_tokenizer(folder, data):
    file = folder / "tokenizer.json"
    file.unlink() if data is None else file.write_bytes(data)
    fails(folder, "tokenizer.json", error=FileNotFoundError if data is None else ValueError)


def test_pickles_are_never_loaded(folder, tmp_path):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    marker = tmp_path / "executed"
    # A pickle that would leave a trace if anything unpickled it.
    (folder / "pytorch_model.bin").write_bytes(f"cpathlib\nPath.touch\n(V{marker}\ntR.".encode())
    fails(folder, "model.safetensors", "pytorch_model.bin", "pickle", error=FileNotFoundError)
    assert not marker.exists()
    (folder / "pytorch_model.bin").unlink()
    fails(folder, "model.safetensors", "missing", error=FileNotFoundError)


def test_a_failed_save_leaves_the_old_files_whole(folder, tmp_path):
    """A disk that fills up half-way, played by the limit on a file's size."""
    resource = pytest.importorskip("resource")
    config = read_config(folder)
    params = load_params(folder, config)
    save_target(tmp_path / "out", config, params)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    more = jax.tree.map(lambda w: w + 1, params)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="model.safetensors"):
            save_target(tmp_path / "out", config, more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_saved_file_declares_its_format(folder, tmp_path):
    config = read_config(folder)
    save_target(tmp_path / "out", config, load_params(folder, config))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
