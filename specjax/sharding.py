"""Sharding is data: ordered (regex over a path -> axes by dimension) rules, strictly applied.

A mesh has the axes "data", "fsdp" and "tensor". Batches are split over data and fsdp, so fsdp
splits weights as well as work; tensor splits attention heads, MLP width and vocabulary. A rule's
regex has to match the end of the path, from a "/" on, so that one rule serves a parameter, its
optimiser moments and its place inside another drafter. Its axes belong to the last dimensions;
leading ones (stacked layers, DeepKD's streams) are never split.

Nothing falls back: a parameter without a rule, a rule without a parameter, and an axis that does
not divide its dimension are errors.
"""

import dataclasses
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
Rules = Sequence[tuple[str, Sequence]]

# What every model has that is made of the same Blocks; a drafter's own parameters have rules in its
# class (`Drafter.partition`). Kernels are split over fsdp on one side of the product and over
# tensor on the other: q, k, v, gate and up by output, o and down by input.
MODEL_RULES: Rules = (
    ("embed|head", ("tensor", "fsdp")),
    ("attn/qkv", ("fsdp", "tensor", None, None)),
    ("attn/qkv_bias", ("tensor", None, None)),
    ("attn/o", ("tensor", "fsdp")),
    ("attn/o_bias", (None,)),
    ("mlp/gate_up", ("fsdp", None, "tensor")),
    ("mlp/down", ("tensor", "fsdp")),
    ("[a-z_]*norm(/[0-9]+)?/scale", (None,)),
)
STATE_RULES: Rules = (("ns_coeffs", (None,)),)  # what an optimiser keeps besides moments: Muon's
REPLICATED: Rules = ((".*", ()),)
LEADING = 2  # most dimensions before those that a rule names


def make_mesh(shape: Sequence[int] = (-1, 1, 1), devices=None) -> Mesh:
    """A ("data", "fsdp", "tensor") mesh; one entry may be -1 and takes what is left.

    (1, 1, 1) is one device, however many there are: a small run need not divide over all of them.

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
    if shape == [1, 1, 1] and jax.process_count() == 1:
        devices = devices[:1]
    if np.prod(shape) != len(devices):
        raise ValueError(f"mesh: {tuple(shape)} does not cover {len(devices)} devices")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_mesh(mesh: Mesh, config) -> None:
    """Refuses a mesh that does not divide a model's geometry.

    Raises:
      ValueError: naming the axis, its size and the field of the model that it does not divide.
    """
    for axis, fields in (
        ("tensor", ("num_kv_heads", "intermediate_size", "vocab_size")),
        ("fsdp", ("hidden_size",)),
    ):
        for field in fields:
            if getattr(config, field) % mesh.shape[axis]:
                raise ValueError(
                    f"mesh: {axis} = {mesh.shape[axis]} does not divide {field} = "
                    f"{getattr(config, field)} of the model"
                )


def path_of(keys) -> str:
    """A key path as "layers/0/attn/qkv"."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys)


def _matches(pattern: str, path: str) -> bool:
    return re.fullmatch(f"(.*/)?({pattern})", path) is not None


def spec_of(path: str, shape: Sequence[int], rules: Rules) -> PartitionSpec:
    """The axes of one leaf by the first rule that matches its path; scalars are never split.

    Raises:
      ValueError: no rule matches, or the one that does has another number of dimensions.
    """
    for pattern, axes in (*rules, *STATE_RULES):
        if _matches(pattern, path):
            leading = len(shape) - len(axes)
            if axes and not 0 <= leading <= LEADING:
                raise ValueError(
                    f"sharding: rule {pattern!r} -> {tuple(axes)} does not fit {path} "
                    f"of shape {tuple(shape)}"
                )
            return PartitionSpec(*(None,) * leading, *axes) if axes else PartitionSpec()
    if not len(shape):
        return PartitionSpec()
    raise ValueError(f"sharding: no rule matches parameter {path} of shape {tuple(shape)}")


def check_rules(tree, rules: Rules) -> None:
    """Raises ValueError for a rule that matches no leaf of `tree` (a typo in a regex)."""
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for pattern, _ in rules:
        if not any(_matches(pattern, path) for path in paths):
            raise ValueError(f"sharding: rule {pattern!r} matches no parameter")


def leaf_sharding(mesh: Mesh, path: str, leaf, rules: Rules = MODEL_RULES) -> NamedSharding:
    """The sharding of one parameter by its path.

    Raises:
      ValueError: as `spec_of`, or an axis of the mesh does not divide its dimension.
    """
    shape = np.shape(leaf)
    spec = spec_of(path, shape, rules)
    for dimension, axis in enumerate(spec):
        names = axis if isinstance(axis, tuple) else (axis,)
        ways = int(np.prod([mesh.shape[name] for name in names if name is not None]))
        if shape[dimension] % ways:
            raise ValueError(
                f"sharding: mesh axis {axis!r} = {ways} does not divide dimension {dimension} of "
                f"{path}, shape {tuple(shape)}; take another mesh, or another rule for it"
            )
    return NamedSharding(mesh, spec)


def shardings(mesh: Mesh, tree, rules: Rules = MODEL_RULES):
    """The tree of NamedShardings for `tree`; raises as `leaf_sharding`."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaf_sharding(mesh, path_of(keys), leaf, rules), tree
    )


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """Batches are split over data and fsdp; one of `rows` that these do not divide is replicated.

    That is for decoding few prompts on many devices: training asks without `rows`.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    whole = rows is not None and rows % ways != 0
    return NamedSharding(mesh, PartitionSpec() if whole else PartitionSpec(BATCH_AXES))


def process_share(mesh: Mesh, rows: int) -> tuple[int, int]:
    """(which part of a batch this process's devices hold, of how many), counted in equal parts.

    Where tensor parallelism spans processes, several hold the same part.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    bounds = [part[0].indices(rows)[:2] for part in parts]
    first, last = min(b[0] for b in bounds), max(b[1] for b in bounds)
    return first // (last - first), rows // (last - first)


def rows_over_mesh(x, whole: bool = True):
    """States Bx... with their rows split over data and fsdp, where a mesh has been set.

    Without it XLA may rather split the sums inside products than gather a weight that fsdp splits,
    and every device then holds the activations of fsdp times as many rows. The other dimensions are
    `whole` or as XLA likes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    others = () if whole else (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *others))


def gathered(table_VxD):
    """An embedding whose rows are whole, where a mesh has been set: what is looked up in it need
    not be put together from pieces that belong to other rows."""
    if jax.sharding.get_abstract_mesh().empty:
        return table_VxD
    return jax.lax.with_sharding_constraint(table_VxD, PartitionSpec("tensor", None))


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree, layout):
    """`tree`, the same in every process, as arrays laid out by a tree of shardings (or one)."""

    def put(leaf, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(layout, NamedSharding):
        return jax.tree.map(lambda leaf: put(leaf, layout), tree)
    return jax.tree.map(put, tree, layout)


def fetch(tree):
    """`tree` on the host, whole in every process (each must call it)."""

    def get(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                leaf = jax.jit(lambda x: x, out_shardings=replicated(leaf.sharding.mesh))(leaf)
            leaf = leaf.addressable_data(0)
        return np.asarray(leaf)

    return jax.tree.map(get, tree)


@dataclasses.dataclass(frozen=True)
class DecodeLayout:
    """How what a round carries lies on a mesh: rows over data and fsdp, k/v heads over tensor.

    Attributes:
      mesh: of the target.
      drafter_sharded: whether the drafter is split as the target is; a replicated one keeps whole
        heads on every device.
    """

    mesh: Mesh
    drafter_sharded: bool = True

    def constrain(self, state):
        """The same decoding state under jit, with its layout stated."""
        rows = batch_sharding(self.mesh, state.lengths_B.shape[0]).spec
        batch = rows[0] if rows else None

        def pin(keys, leaf):
            path = path_of(keys)
            heads = _matches("k|v", re.sub(r"/\d+$", "", path))
            split = "tensor" if self.drafter_sharded or not path.startswith("drafter") else None
            axes = (batch, split, None, None) if heads else (batch,)
            leading = leaf.ndim - 4 if heads else 0
            spec = PartitionSpec(*(None,) * leading, *axes)
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return jax.tree_util.tree_map_with_path(pin, state)
