"""Hugging Face model folders in and out: config.json and safetensors, nothing else is read.

One table, `LAYER_WEIGHTS`, says how a fused parameter of ours is made from checkpoint tensors and
cut back into them; everything else follows from it.

A target may be larger than the host's memory. Each device's slice of each tensor is read on its
own and the tensors are fused, cast and transposed where they arrive: the host never holds more than
one slice, the devices never more than the model and one layer.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from specjax.files import write_safetensors, write_text
from specjax.models.checkpoint import Checkpoint
from specjax.models.config import ModelConfig, config_to_hf


def _qkv_kernel(config: ModelConfig, q, k, v):
    """[H*K, D] and two [G*K, D] matrices -> DxGx(R+2)xK, grouped by key/value head."""
    G, K = config.num_kv_heads, config.head_dim
    parts = [w.reshape(G, -1, K, w.shape[1]) for w in (q, k, v)]
    return jnp.concatenate(parts, axis=1).transpose(3, 0, 1, 2)


def _split_qkv(config: ModelConfig, kernel):
    R = config.num_heads // config.num_kv_heads
    parts = kernel[:, :, :R], kernel[:, :, R : R + 1], kernel[:, :, R + 1 :]
    return [p.reshape(kernel.shape[0], -1).T for p in parts]


def _qkv_bias(config: ModelConfig, q, k, v):
    G, K = config.num_kv_heads, config.head_dim
    return jnp.concatenate([b.reshape(G, -1, K) for b in (q, k, v)], axis=1)


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
    return jnp.stack([gate, up]).transpose(2, 0, 1)


def _split_gate_up(config, w):
    return [w[:, 0].T, w[:, 1].T]


class Layout(NamedTuple):
    """How one parameter of ours lies in a checkpoint."""

    names: tuple[str, ...]  # of its tensors
    fuse: Callable  # (config, *tensors) -> the parameter
    split: Callable  # (config, parameter) -> the tensors
    # Our axis that runs along each axis of the tensors, or whose groups of rows do: what splits it
    # over devices splits them.
    axes: tuple[int, ...]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKV_WEIGHTS = tuple(f"{n}.weight" for n in _QKV)
_QKV_BIASES = tuple(f"{n}.bias" for n in _QKV)
_GATE_UP_WEIGHTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")

# Ours -> names below the layer's prefix.
LAYER_WEIGHTS: dict[tuple[str, ...], Layout] = {
    ("attn_norm", "scale"): Layout(("input_layernorm.weight",), _same, _one, (0,)),
    ("attn", "qkv"): Layout(_QKV_WEIGHTS, _qkv_kernel, _split_qkv, (1, 0)),
    ("attn", "qkv_bias"): Layout(_QKV_BIASES, _qkv_bias, _split_qkv_bias, (0,)),
    ("attn", "q_norm", "scale"): Layout(("self_attn.q_norm.weight",), _same, _one, (0,)),
    ("attn", "k_norm", "scale"): Layout(("self_attn.k_norm.weight",), _same, _one, (0,)),
    ("attn", "o"): Layout(("self_attn.o_proj.weight",), _transpose, _transpose_one, (1, 0)),
    ("attn", "o_bias"): Layout(("self_attn.o_proj.bias",), _same, _one, (0,)),
    ("mlp_norm", "scale"): Layout(("post_attention_layernorm.weight",), _same, _one, (0,)),
    ("mlp", "gate_up"): Layout(_GATE_UP_WEIGHTS, _gate_up, _split_gate_up, (2, 0)),
    ("mlp", "down"): Layout(("mlp.down_proj.weight",), _transpose, _transpose_one, (1, 0)),
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


EMBED, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def layer_prefix(i: int) -> str:
    """What the names of layer i's tensors begin with."""
    return f"model.layers.{i}."


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a checkpoint of this config holds."""
    D, V = config.hidden_size, config.vocab_size
    shapes = {EMBED: (V, D), FINAL_NORM: (D,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (V, D)
    one = layer_shapes(config)
    names = [name for path in layer_paths(config) for name in LAYER_WEIGHTS[path].names]
    for i in range(config.num_layers):
        shapes |= {layer_prefix(i) + name: one[name] for name in names}
    return shapes


def split_layer(layer, config: ModelConfig, prefix: str) -> dict[str, np.ndarray]:
    """The inverse of `Loader.layer`: checkpoint tensors by full name."""
    tensors = {}
    for path in layer_paths(config):
        node = layer
        for key in path:
            node = node[key]
        layout = LAYER_WEIGHTS[path]
        parts = layout.split(config, np.asarray(node))
        pairs = zip(layout.names, parts, strict=True)
        tensors |= {prefix + n: np.ascontiguousarray(p) for n, p in pairs}
    return tensors


# (path such as "layers/0/attn/qkv", the parameter's shape) -> where it goes
ShardingOf = Callable[[str, jax.ShapeDtypeStruct], Sharding]


@functools.lru_cache(maxsize=256)
def _fused(fuse: Callable, config: ModelConfig, dtype, sharding: Sharding | None):
    """Fuses and casts tensors on the devices that hold their slices; nothing moves between them."""
    return jax.jit(lambda *parts: fuse(config, *parts).astype(dtype), out_shardings=sharding)


@dataclasses.dataclass(frozen=True)
class Loader:
    """Reads parameters of a geometry into device memory.

    Attributes:
      dtype: of the parameters; None keeps the checkpoint's.
      sharding_of: None is the default device.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    dtype: Any = None
    sharding_of: ShardingOf | None = None

    def load(self, path: str, shapes: dict[str, tuple[int, ...]], fuse=_same, axes=()):
        """The parameter `path` from tensors by name; `fuse` and `axes` as in `Layout`."""
        stored = jnp.result_type(*map(self.checkpoint.dtype, shapes))
        dtype = jnp.dtype(self.dtype or stored)
        parts = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes.values()]
        like = jax.eval_shape(functools.partial(fuse, self.config), *parts)
        whole = slices = self.sharding_of and self.sharding_of(path, like)
        if axes and isinstance(whole, NamedSharding):
            spec = [*whole.spec, *[None] * like.ndim]
            slices = NamedSharding(whole.mesh, PartitionSpec(*(spec[axis] for axis in axes)))
        parts = [self.checkpoint.put(name, shape, slices) for name, shape in shapes.items()]
        if fuse is _same and stored == dtype:
            return parts[0]
        return jax.block_until_ready(_fused(fuse, self.config, dtype, whole)(*parts))

    def layer(self, prefix: str, path: str, in_dim: int | None = None) -> dict[str, Any]:
        """One layer from the tensors below `prefix` (e.g. "model.layers.0.").

        Args:
          path: what `sharding_of` finds it under, e.g. "layers/0".
          in_dim: as in `layer_shapes`.
        """
        shapes, layer = layer_shapes(self.config, in_dim), {}
        for keys in layer_paths(self.config):
            names, fuse, _, axes = LAYER_WEIGHTS[keys]
            node = layer
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            parts = {prefix + name: shapes[name] for name in names}
            node[keys[-1]] = self.load("/".join((path, *keys)), parts, fuse, axes)
        return layer

    def stacked(self) -> dict[str, Any]:
        """All layers as one, with a leading L axis, filled layer by layer in place."""
        for i in range(self.config.num_layers):
            layer = self.layer(layer_prefix(i), f"layers/{i}")
            if i == 0:
                stack = jax.tree_util.tree_map_with_path(self._empty, layer)
            stack = jax.block_until_ready(_write_layer(stack, layer, i))
        return stack

    def _empty(self, keys, leaf):
        """The stacked parameter that layers with this leaf go into."""
        shape, dtype = (self.config.num_layers, *leaf.shape), leaf.dtype
        path = "layers/" + jax.tree_util.keystr(keys, simple=True, separator="/")
        sharding = self.sharding_of and self.sharding_of(path, jax.ShapeDtypeStruct(shape, dtype))
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stack, layer, i):
    write = lambda s, w: jax.lax.dynamic_update_index_in_dim(s, w, i, axis=0)  # noqa: E731
    return jax.tree.map(write, stack, layer)


def load_params(
    folder,
    config: ModelConfig,
    dtype=None,
    sharding_of: ShardingOf | None = None,
    scan_layers: bool = False,
):
    """Reads a target's parameters into device memory.

    Args:
      folder: a Hugging Face folder.
      config: its geometry.
      dtype: of the parameters; None keeps the checkpoint's.
      sharding_of: where each goes; None is the default device.
      scan_layers: one stacked layer in place of a list.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: files are damaged, or a tensor is missing or not what `config` asks; nothing has
        been read by then. Or a number that is not finite, found when it is read.
    """
    checkpoint = Checkpoint(folder)
    shapes = tensor_shapes(config)
    if config.tie_word_embeddings and EMBED not in checkpoint.names:
        # Tied checkpoints may store the shared matrix under either name.
        shapes = {HEAD if name == EMBED else name: shape for name, shape in shapes.items()}
    checkpoint.check(shapes)
    loader = Loader(checkpoint, config, dtype, sharding_of)
    load = lambda path, name: loader.load(path, {name: shapes[name]})  # noqa: E731
    params = {"embed": load("embed", EMBED if EMBED in shapes else HEAD)}
    if scan_layers:
        params["layers"] = loader.stacked()
    else:
        params["layers"] = [
            loader.layer(layer_prefix(i), f"layers/{i}") for i in range(config.num_layers)
        ]
    params["final_norm"] = {"scale": load("final_norm/scale", FINAL_NORM)}
    if not config.tie_word_embeddings:
        params["head"] = load("head", HEAD)
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
