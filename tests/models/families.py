"""One tiny model of every supported family: its config.json as that family's checkpoints write it.

Weights come from a recipe instead of a file. The tensor called NAME of a model with a given seed is

    u = RandomState([seed, crc32(NAME)]).random_sample(shape)        (NumPy's frozen generator)
    w = centre + spread * sqrt(3) * (2 u - 1), cast to float32

so it has mean `centre` and standard deviation `spread`: 1 and 0.3 for norm scales, 0 and 0.5 for
biases, 0 and 1 for embeddings, 0 and 1.5 / sqrt(fan_in) for matrices. No weight is left at the
0 or 1 it is usually initialised to, which would hide a missing one.
"""

import json
import math
import zlib

import numpy as np
from safetensors.numpy import save_file

_COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
# With head_dim 16 and theta 500000 the original context of 64 puts pairs into all three bands:
# kept, blended and stretched.
_LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_type": "llama3",
}  # fmt: skip
_MISTRAL = _LLAMA | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2,
    "rope_theta": 1000000.0, "max_position_embeddings": 512, "sliding_window": None,
}  # fmt: skip
_MISTRAL.pop("attention_bias")
_QWEN = _COMMON | {
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "num_key_value_heads": 2,
    "use_sliding_window": False, "max_window_layers": 2, "max_position_embeddings": 512,
}  # fmt: skip
_QWEN2 = _QWEN | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 64,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip

FAMILIES = {
    # The oldest configs carry neither rope_theta nor head_dim.
    "llama2": _LLAMA
    | {"num_key_value_heads": 4, "max_position_embeddings": 256, "rope_scaling": None},
    "llama2-tied": _LLAMA
    | {"num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True},
    "llama3": _LLAMA
    | {"num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 500000.0},
    "llama3.1": _LLAMA
    | {
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE, "eos_token_id": [2, 3, 5],
    },
    "llama3.2": _LLAMA
    | {
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512,
        "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    # Long-context Vicuna names the kind of scaling "type".
    "vicuna": _LLAMA
    | {
        "num_key_value_heads": 4, "max_position_embeddings": 256,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "r1-distill-llama": _LLAMA
    | {
        "num_key_value_heads": 2, "max_position_embeddings": 512, "mlp_bias": False,
        "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE, "bos_token_id": 60,
        "eos_token_id": 61,
    },
    "llama-bias": _LLAMA
    | {"num_key_value_heads": 2, "max_position_embeddings": 256, "attention_bias": True},
    # As v0.3 has it; Nemo's heads are not hidden_size / heads wide.
    "mistral": _MISTRAL,
    "mistral-nemo": _MISTRAL | {"head_dim": 6, "rope_theta": 500000.0, "num_key_value_heads": 1},
    "qwen2": _QWEN2,
    "qwen2.5-tied": _QWEN2 | {"rope_theta": 1000000.0, "tie_word_embeddings": True},
    "qwen3": _QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16,
        "attention_bias": False, "sliding_window": None, "tie_word_embeddings": True,
    },
    "qwen3-untied": _QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 6,
        "attention_bias": True, "sliding_window": None, "tie_word_embeddings": False,
    },
}  # fmt: skip


def shapes(raw):
    """Names and shapes of the tensors that a checkpoint of this config holds."""
    D, F, V = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    K = raw.get("head_dim", D // raw["num_attention_heads"])
    q, kv = raw["num_attention_heads"] * K, raw["num_key_value_heads"] * K
    qwen2, qwen3 = raw["model_type"] == "qwen2", raw["model_type"] == "qwen3"
    out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not raw["tie_word_embeddings"]:
        out["lm_head.weight"] = (V, D)
    for i in range(raw["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out |= {p + "input_layernorm.weight": (D,), p + "post_attention_layernorm.weight": (D,)}
        for name, rows, columns in (("q", q, D), ("k", kv, D), ("v", kv, D), ("o", D, q)):
            out[f"{p}self_attn.{name}_proj.weight"] = (rows, columns)
            if raw.get("attention_bias") or (qwen2 and name != "o"):
                out[f"{p}self_attn.{name}_proj.bias"] = (rows,)
            if qwen3 and name in "qk":
                out[f"{p}self_attn.{name}_norm.weight"] = (K,)
        out |= {p + "mlp.gate_proj.weight": (F, D), p + "mlp.up_proj.weight": (F, D)}
        out[p + "mlp.down_proj.weight"] = (D, F)
    return out


def weight(name, shape, seed=0):
    """One tensor of the recipe in the module docstring."""
    random = np.random.RandomState([seed, zlib.crc32(name.encode())]).random_sample(shape)
    if name.endswith("norm.weight"):
        centre, spread = 1.0, 0.3
    elif name.endswith(".bias"):
        centre, spread = 0.0, 0.5
    elif name.endswith("embed_tokens.weight"):
        centre, spread = 0.0, 1.0
    else:
        centre, spread = 0.0, 1.5 / math.sqrt(shape[-1])
    return (centre + spread * math.sqrt(3) * (2 * random - 1)).astype(np.float32)


def weights(raw, seed=0):
    """All tensors of a model by checkpoint name."""
    return {name: weight(name, shape, seed) for name, shape in shapes(raw).items()}


def write_folder(folder, raw, tensors, shards=1):
    """A Hugging Face folder with the tensors dealt out over `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        part = {name: tensors[name] for name in tensors if where[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tokens(raw, rows, length, seed=0):
    """Random ids, [rows, length]."""
    random = np.random.RandomState([seed, rows, length])
    return random.randint(0, raw["vocab_size"], (rows, length)).astype(np.int32)
