"""Shapes and their shares: who holds what, by the rules that place the parameters.

A device runs the whole program at the shapes of its shard. Tensor parallelism splits key/value
heads, MLP width and vocabulary, so the program of one device is that of a model with fewer of them.
Rows of a training batch are split over "data". Over "fsdp" parameters and their gradients are split
and so is the sum inside each matrix product, but not the arrays that it returns: with kernels split
on their input side, XLA adds up partial products rather than gather kernels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from specjax import sharding
from specjax.drafters import Drafter
from specjax.models.config import ModelConfig
from specjax.models.transformer import init_params, stack_layers


def target_shapes(config: ModelConfig, dtype: str, scan_layers: bool):
    """A target's parameters as shapes; layers are alike, so one is traced."""
    one = config.replace(num_layers=1)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), one, jnp.dtype(dtype)))
    params = params | {"layers": params["layers"] * config.num_layers}
    return jax.eval_shape(stack_layers, params) if scan_layers else params


def drafter_shapes(definition: Drafter, target_params):
    """(trainable parameters, constants) of a fresh drafter as shapes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(definition.init, key, target_params)
    return {k: v for k, v in params.items() if k != "buffers"}, params.get("buffers", {})


def count(tree) -> int:
    """Parameters of a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(leaf) -> int:
    """Bytes of one array or shape."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def whole_bytes(tree) -> int:
    """Bytes of a tree, unsharded."""
    return sum(map(nbytes, jax.tree.leaves(tree)))


def rules_of(definition: Drafter) -> sharding.Rules:
    """How a drafter's parameters and optimiser state lie on the mesh, unless a config overrides."""
    return (*definition.partition, *sharding.MODEL_RULES)


def shard_shapes(mesh, tree, rules: sharding.Rules = sharding.MODEL_RULES):
    """The tree of what one device holds of each leaf."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(s.shard_shape(leaf.shape), leaf.dtype),
        tree,
        sharding.shardings(mesh, tree, rules),
    )


def device_bytes(mesh, tree, rules: sharding.Rules = sharding.MODEL_RULES) -> int:
    """Bytes that one device holds of a tree."""
    return whole_bytes(shard_shapes(mesh, tree, rules))


def batch_share(mesh, batch: int) -> int:
    """Rows of a training batch on one device.

    Raises:
      ValueError: the mesh does not divide the batch.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % ways:
        raise ValueError(
            f"train.batch_size: {batch} is not a multiple of {ways}, the mesh's data * fsdp"
        )
    return batch // ways


def _leaves(tree) -> dict:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_of(keys): leaf for keys, leaf in found}


def _held(mesh, tree, ending: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(shape, one device's share of it) of the first parameter whose path ends so."""
    for path, leaf in _leaves(tree).items():
        if path.endswith(ending):
            return leaf.shape, sharding.leaf_sharding(mesh, path, leaf).shard_shape(leaf.shape)
    return None


def share_of_model(mesh, config: ModelConfig, params) -> ModelConfig:
    """The geometry that one device computes with."""
    (*_, G, rows, _), (*_, G_here, _, _) = _held(mesh, params, "attn/qkv")
    F_here = _held(mesh, params, "mlp/gate_up")[1][-1]
    V_here = _held(mesh, params, "embed")[1][0]
    return config.replace(
        num_kv_heads=G_here, num_heads=G_here * (rows - 2), intermediate_size=F_here,
        vocab_size=V_here,
    )  # fmt: skip


def share_of_drafter(mesh, definition: Drafter, params, target: ModelConfig) -> Drafter:
    """The drafter that one device computes with, for the target that it computes with."""
    changes: dict = {"target": target}
    fields = {f.name for f in dataclasses.fields(definition)}
    inner = getattr(definition, "inner", None)
    if inner is not None:
        changes["inner"] = share_of_drafter(mesh, inner, params, target)
    qkv, gate_up = _held(mesh, params, "attn/qkv"), _held(mesh, params, "mlp/gate_up")
    if "num_kv_heads" in fields and qkv:
        G, rows = qkv[1][-3], qkv[0][-2]
        changes |= {"num_kv_heads": G, "num_heads": G * (rows - 2)}
    if "intermediate_size" in fields and gate_up:
        changes["intermediate_size"] = gate_up[1][-1]
    size = getattr(definition, "draft_vocab_size", 0)
    if size:
        head = _held(mesh, params, "head")
        split = head[1][0] if head else size * target.vocab_size // definition.target.vocab_size
        changes["draft_vocab_size"] = min(split, target.vocab_size)
    if getattr(definition, "own_model", None) is not None:
        changes["own_model"] = share_of_model(mesh, definition.own_model, params)
    return dataclasses.replace(definition, **changes)


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return jnp.dtype(dtype).itemsize
