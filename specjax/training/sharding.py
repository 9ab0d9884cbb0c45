"""Sharding is data: ordered (regex over path -> PartitionSpec) rules, strictly applied."""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
Rules = Sequence[tuple[str, PartitionSpec]]

# The target and every drafter built from the same Block. Kernels are split over `fsdp` on their
# input side and over `tensor` on heads or MLP width; `(stacked/)?` layers carry a leading L axis.
MODEL_RULES: Rules = (
    (r"(^|.*/)embed$", PartitionSpec("tensor", "fsdp")),
    (r"(^|.*/)head$", PartitionSpec("tensor", "fsdp")),
    (r".*layers/\d+/attn/qkv$", PartitionSpec("fsdp", "tensor", None, None)),
    (r".*layers/attn/qkv$", PartitionSpec(None, "fsdp", "tensor", None, None)),
    (r".*layers/\d+/attn/o$", PartitionSpec("tensor", "fsdp")),
    (r".*layers/attn/o$", PartitionSpec(None, "tensor", "fsdp")),
    (r".*layers/\d+/mlp/gate_up$", PartitionSpec("fsdp", None, "tensor")),
    (r".*layers/mlp/gate_up$", PartitionSpec(None, "fsdp", None, "tensor")),
    (r".*layers/\d+/mlp/down$", PartitionSpec("tensor", "fsdp")),
    (r".*layers/mlp/down$", PartitionSpec(None, "tensor", "fsdp")),
    (r".*", PartitionSpec()),  # norms, biases, scalars: replicated
)


def make_mesh(shape: Sequence[int] = (-1, 1, 1), devices=None) -> Mesh:
    """A ("data", "fsdp", "tensor") mesh; one entry may be -1 and takes what is left.

    Raises:
      ValueError: the shape does not have three entries or does not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = list(shape)
    if len(shape) != len(AXES):
        raise ValueError(
            f"mesh: {tuple(shape)} must have {len(AXES)} entries, one for each of {AXES}"
        )
    if any(n < 1 and n != -1 for n in shape) or shape.count(-1) > 1:
        raise ValueError(f"mesh: {tuple(shape)} must hold positive numbers and at most one -1")
    if -1 in shape:
        rest = int(np.prod([n for n in shape if n != -1]))
        shape[shape.index(-1)] = len(devices) // rest
    if np.prod(shape) != len(devices):
        raise ValueError(f"mesh: {tuple(shape)} does not cover {len(devices)} devices")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def path_of(keys) -> str:
    """A key path as "layers/0/attn/qkv"."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys)


def specs(tree, rules: Rules, strict: bool = True):
    """The tree of PartitionSpecs: for every leaf the first rule whose regex matches its path.

    Raises:
      ValueError: a leaf matches no rule; or, when strict, a rule before the catch-all names a leaf
        that does not have as many dimensions as its spec.
    """

    def spec(keys, leaf):
        path = path_of(keys)
        for pattern, partition in rules:
            if re.fullmatch(pattern, path):
                if strict and len(partition) > np.ndim(leaf):
                    raise ValueError(
                        f"sharding: rule {pattern!r} -> {partition} does not fit {path} "
                        f"of shape {np.shape(leaf)}"
                    )
                return partition
        raise ValueError(f"sharding: no rule matches parameter {path}")

    return jax.tree_util.tree_map_with_path(spec, tree)


def check_rules(tree, rules: Rules):
    """Raises ValueError for a rule that matches no leaf of `tree` (a typo in a regex)."""
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(f"sharding: rule {pattern!r} matches no parameter")


def _divisible(mesh: Mesh, spec: PartitionSpec, shape) -> PartitionSpec:
    """Drops axes that do not divide their dimension (a replicated dimension is always right)."""

    def keep(axis, size):
        names = axis if isinstance(axis, tuple) else (axis,)
        ways = int(np.prod([mesh.shape[n] for n in names if n is not None]))
        return axis if axis is not None and size % ways == 0 else None

    return PartitionSpec(*(keep(axis, size) for axis, size in zip(spec, shape, strict=False)))


def shardings(mesh: Mesh, tree, rules: Rules = MODEL_RULES):
    """The tree of NamedShardings for `tree` (arrays or ShapeDtypeStructs)."""
    return jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, _divisible(mesh, spec, np.shape(leaf))),
        tree,
        specs(tree, rules),
    )


def leaf_sharding(mesh: Mesh, path: str, leaf, rules: Rules = MODEL_RULES) -> NamedSharding:
    """The sharding of one parameter by its path."""
    for pattern, partition in rules:
        if re.fullmatch(pattern, path):
            return NamedSharding(mesh, _divisible(mesh, partition, np.shape(leaf)))
    raise ValueError(f"sharding: no rule matches parameter {path}")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
