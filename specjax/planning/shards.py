"""Shapes and their shares: who holds what, by the rules that place the parameters.

A device runs the whole program at the shapes of its shard. Tensor parallelism splits key/value
heads, MLP width and vocabulary, so the program of one device is that of a model with fewer of them.
Rows of a batch are split over "data" and "fsdp" alike; what "fsdp" splits of a weight is gathered
ahead of its product (how long it stays: `gathered_bytes`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from specjax import sharding
from specjax.drafters import Drafter
from specjax.drafters.base import split_buffers
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
    return split_buffers(params)


def count(tree) -> int:
    """Parameters of a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(leaf) -> int:
    """Bytes of one array or shape."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def whole_bytes(tree) -> int:
    """Bytes of a tree, unsharded."""
    return sum(map(nbytes, jax.tree.leaves(tree)))


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


def rows_here(mesh, batch: int) -> int:
    """Rows of a decoded batch on one device: all, where the mesh does not divide them."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return batch if batch % ways else batch // ways


def gathered_bytes(model, params_here, held) -> int:
    """What a training step holds of weights that fsdp splits, beyond its own share of them.

    A drafter's stay from the forward pass to the backward one, the target's embedding and head
    for the whole step; of its layers one at a time.

    Args:
      model: the target, `programs.Model`.
      params_here: the drafter's parameters as its program reads them.
      held: the device's share of them.
    """
    if model.mesh.shape["fsdp"] == 1:
        return 0
    target = model.params_here
    layers = target["layers"]
    one = whole_bytes(layers) // model.config.num_layers
    ends = {k: v for k, v in target.items() if k != "layers"}
    own = {k: v for k, v in model.params.items() if k != "layers"}
    more = whole_bytes(ends) - device_bytes(model.mesh, own, model.rules)
    return more + one + max(whole_bytes(params_here) - whole_bytes(held), 0)


def _leaves(tree) -> dict:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_of(keys): leaf for keys, leaf in found}


def _held(mesh, tree, ending: str, rules) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(shape, one device's share of it) of the first parameter whose path ends so."""
    for path, leaf in _leaves(tree).items():
        if path.endswith(ending):
            here = sharding.leaf_sharding(mesh, path, leaf, rules)
            return leaf.shape, here.shard_shape(leaf.shape)
    return None


def share_of_model(
    mesh, config: ModelConfig, params, rules: sharding.Rules = sharding.MODEL_RULES
) -> ModelConfig:
    """The geometry that one device computes with."""
    (*_, G, rows, _), (*_, G_here, _, _) = _held(mesh, params, "attn/qkv", rules)
    F_here = _held(mesh, params, "mlp/gate_up", rules)[1][-1]
    V_here = _held(mesh, params, "embed", rules)[1][0]
    return config.replace(
        num_kv_heads=G_here, num_heads=G_here * (rows - 2), intermediate_size=F_here,
        vocab_size=V_here,
    )  # fmt: skip


def share_of_drafter(
    mesh, definition: Drafter, params, target: ModelConfig, rules: sharding.Rules
) -> Drafter:
    """The drafter that one device computes with, for the target that it computes with."""
    changes: dict = {"target": target}
    fields = {f.name for f in dataclasses.fields(definition)}
    inner = getattr(definition, "inner", None)
    if inner is not None:
        changes["inner"] = share_of_drafter(mesh, inner, params, target, rules)
    qkv, gate_up = (_held(mesh, params, path, rules) for path in ("attn/qkv", "mlp/gate_up"))
    if "num_kv_heads" in fields and qkv:
        G, rows = qkv[1][-3], qkv[0][-2]
        changes |= {"num_kv_heads": G, "num_heads": G * (rows - 2)}
    if "intermediate_size" in fields and gate_up:
        changes["intermediate_size"] = gate_up[1][-1]
    size = getattr(definition, "draft_vocab_size", 0)
    if size:
        head = _held(mesh, params, "head", rules)
        split = head[1][0] if head else size * target.vocab_size // definition.target.vocab_size
        changes["draft_vocab_size"] = min(split, target.vocab_size)
    if getattr(definition, "own_model", None) is not None:
        changes["own_model"] = share_of_model(mesh, definition.own_model, params, rules)
    return dataclasses.replace(definition, **changes)


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return jnp.dtype(dtype).itemsize
