"""Hugging Face model folders in and out: config.json and safetensors, nothing else is read.

One table, `LAYER_WEIGHTS`, says how a fused parameter of ours is made from checkpoint tensors and
cut back into them; everything else follows from it.
"""

import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
from safetensors import SafetensorError, safe_open

from specjax.files import write_safetensors, write_text
from specjax.models.config import ModelConfig, config_to_hf, read_config, read_json


def _qkv_kernel(config: ModelConfig, q, k, v):
    """[H*K, D] and two [G*K, D] matrices -> DxGx(R+2)xK, grouped by key/value head."""
    G, K = config.num_kv_heads, config.head_dim
    parts = [w.T.reshape(w.shape[1], G, -1, K) for w in (q, k, v)]
    return np.concatenate(parts, axis=2)


def _split_qkv(config: ModelConfig, kernel):
    R = config.num_heads // config.num_kv_heads
    parts = kernel[:, :, :R], kernel[:, :, R : R + 1], kernel[:, :, R + 1 :]
    return [p.reshape(kernel.shape[0], -1).T for p in parts]


def _qkv_bias(config: ModelConfig, q, k, v):
    G, K = config.num_kv_heads, config.head_dim
    return np.concatenate([b.reshape(G, -1, K) for b in (q, k, v)], axis=1)


def _split_qkv_bias(config: ModelConfig, bias):
    R = config.num_heads // config.num_kv_heads
    return [p.reshape(-1) for p in (bias[:, :R], bias[:, R : R + 1], bias[:, R + 1 :])]


def _same(config, w):
    return w


def _one(config, w):
    return [w]


def _transpose(config, w):
    return w.T


def _transpose_one(config, w):
    return [w.T]


def _gate_up(config, gate, up):
    return np.stack([gate.T, up.T], axis=1)


def _split_gate_up(config, w):
    return [w[:, 0].T, w[:, 1].T]


# Anything else is quantised, and a plain cast would not undo that.
WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

# ours -> (checkpoint names below the layer's prefix, fuse, split)
LAYER_WEIGHTS: dict[tuple[str, ...], tuple[tuple[str, ...], Callable, Callable]] = {
    ("attn_norm", "scale"): (("input_layernorm.weight",), _same, _one),
    ("attn", "qkv"): (tuple(f"{n}.weight" for n in _QKV), _qkv_kernel, _split_qkv),
    ("attn", "qkv_bias"): (tuple(f"{n}.bias" for n in _QKV), _qkv_bias, _split_qkv_bias),
    ("attn", "q_norm", "scale"): (("self_attn.q_norm.weight",), _same, _one),
    ("attn", "k_norm", "scale"): (("self_attn.k_norm.weight",), _same, _one),
    ("attn", "o"): (("self_attn.o_proj.weight",), _transpose, _transpose_one),
    ("attn", "o_bias"): (("self_attn.o_proj.bias",), _same, _one),
    ("mlp_norm", "scale"): (("post_attention_layernorm.weight",), _same, _one),
    ("mlp", "gate_up"): (("mlp.gate_proj.weight", "mlp.up_proj.weight"), _gate_up, _split_gate_up),
    ("mlp", "down"): (("mlp.down_proj.weight",), _transpose, _transpose_one),
}


def layer_paths(config: ModelConfig) -> list[tuple[str, ...]]:
    """The parameter paths that a layer of this config has."""
    absent = {
        name
        for name, present in (
            ("qkv_bias", config.qkv_bias),
            ("o_bias", config.o_bias),
            ("q_norm", config.qk_norm),
            ("k_norm", config.qk_norm),
        )
        if not present
    }
    return [path for path in LAYER_WEIGHTS if not absent & set(path)]


def layer_shapes(
    config: ModelConfig, in_dim: int | None = None, outputs: int = 1
) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensor shapes of one layer.

    `in_dim` widens q, k and v (drafters' first layer), `outputs` the MLP's end (see `layers.MLP`).
    """
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv, wide = config.num_heads * K, config.num_kv_heads * K, in_dim or config.hidden_size
    return {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (q, wide),
        "self_attn.k_proj.weight": (kv, wide),
        "self_attn.v_proj.weight": (kv, wide),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.q_norm.weight": (K,),
        "self_attn.k_norm.weight": (K,),
        "self_attn.o_proj.weight": (D, q),
        "self_attn.o_proj.bias": (D,),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (outputs * D, F),
    }


class Checkpoint:
    """Lazy reader over the safetensors shards of a folder; tensors are read one at a time.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: a shard is truncated or not safetensors.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        index, single = (
            self.folder / "model.safetensors.index.json",
            self.folder / "model.safetensors",
        )
        if index.is_file():
            where = read_json(index).get("weight_map")
            if not (isinstance(where, dict) and all(isinstance(v, str) for v in where.values())):
                raise ValueError(f"{index}: not a safetensors index: weight_map names no shards")
        elif single.is_file():
            where = None
        else:
            pickles = sorted(p.name for p in self.folder.glob("*.bin"))
            hint = f" ({pickles[0]} is pickle, which is never loaded)" if pickles else ""
            raise FileNotFoundError(f"{single}: missing; weights load from safetensors only{hint}")
        shards = {"model.safetensors"} if where is None else set(where.values())
        self._files, self.names = {}, {}
        for shard in sorted(shards):
            path = self.folder / shard
            if not path.is_file():
                raise FileNotFoundError(f"{path}: missing, though {index.name} names it")
            try:
                self._files[shard] = safe_open(path, framework="np")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: truncated or not safetensors: {error}") from error
            self.names |= {name: shard for name in self._files[shard].keys()}

    def read(self, name: str, shape: tuple[int, ...], dtypes=WEIGHT_DTYPES) -> np.ndarray:
        """One tensor; checks its presence, shape and dtype."""
        if name not in self.names:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        path = self.folder / self.names[name]
        array = self._files[self.names[name]].get_tensor(name)
        if array.shape != shape:
            raise ValueError(f"{path}: {name} has shape {array.shape}, config.json asks {shape}")
        if array.dtype.name not in dtypes:
            raise ValueError(
                f"{path}: {name} has dtype {array.dtype.name}; one of {dtypes} is expected"
            )
        return array

    def read_layer(
        self, prefix: str, config: ModelConfig, in_dim: int | None = None, outputs: int = 1
    ):
        """One layer's parameter tree from the tensors below `prefix` (e.g. "model.layers.0.")."""
        shapes, layer = layer_shapes(config, in_dim, outputs), {}
        for path in layer_paths(config):
            names, fuse, _ = LAYER_WEIGHTS[path]
            value = fuse(config, *(self.read(prefix + n, shapes[n]) for n in names))
            node = layer
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = value
        return layer


def split_layer(layer, config: ModelConfig, prefix: str) -> dict[str, np.ndarray]:
    """The inverse of `Checkpoint.read_layer`: checkpoint tensors by full name."""
    tensors = {}
    for path in layer_paths(config):
        node = layer
        for key in path:
            node = node[key]
        names, _, split = LAYER_WEIGHTS[path]
        parts = split(config, np.asarray(node))
        tensors |= {prefix + n: np.ascontiguousarray(p) for n, p in zip(names, parts, strict=True)}
    return tensors


def load_params(folder, config: ModelConfig, place: Callable = lambda path, array: array):
    """Reads a target's parameters (layers as a list).

    Args:
      folder: a Hugging Face folder.
      config: its geometry.
      place: called with (path, host array) for every parameter as soon as it is read, and returns
        what to keep: a cast, a device put, a sharded put. Host memory holds one layer at a time.
    """
    checkpoint = Checkpoint(folder)
    D, V = config.hidden_size, config.vocab_size
    embed_name, head_name = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings and embed_name not in checkpoint.names:
        embed_name = head_name  # tied checkpoints may store the shared matrix under either name

    def placed(tree, prefix):
        if isinstance(tree, dict):
            return {k: placed(v, f"{prefix}/{k}") for k, v in tree.items()}
        return place(prefix, tree)

    params = {
        "embed": place("embed", checkpoint.read(embed_name, (V, D))),
        "layers": [
            placed(checkpoint.read_layer(f"model.layers.{i}.", config), f"layers/{i}")
            for i in range(config.num_layers)
        ],
        "final_norm": {
            "scale": place("final_norm/scale", checkpoint.read("model.norm.weight", (D,)))
        },
    }
    if not config.tie_word_embeddings:
        params["head"] = place("head", checkpoint.read(head_name, (V, D)))
    return params


def save_target(folder, config: ModelConfig, params, dtype: str = "bfloat16"):
    """Writes config.json and model.safetensors so that `transformers` loads them."""
    import ml_dtypes

    text = json.dumps(config_to_hf(config, dtype), indent=2) + "\n"
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cast = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = {"model.embed_tokens.weight": np.asarray(params["embed"])}
    for i, layer in enumerate(params["layers"]):
        tensors |= split_layer(layer, config, f"model.layers.{i}.")
    tensors["model.norm.weight"] = np.asarray(params["final_norm"]["scale"])
    if "head" in params:
        tensors["lm_head.weight"] = np.asarray(params["head"])
    write_safetensors(folder / "model.safetensors", {k: v.astype(cast) for k, v in tensors.items()})
    write_text(folder / "config.json", text)


__all__ = ["Checkpoint", "load_params", "read_config", "save_target", "split_layer"]
