"""What a forward pass cannot avoid: bytes of weights and cache to read, operations to compute."""

import dataclasses

import jax

from specjax.drafters import Drafter, Eagle3, FastEagle, Vanilla
from specjax.drafters.base import split_buffers
from specjax.models.config import ModelConfig
from specjax.models.transformer import head_VxD


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes read at least once and floating-point operations; adds up over passes."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: int) -> "Work":
        return Work(self.bytes * times, self.flops * times)


def weight_bytes(params) -> int:
    """Bytes of all leaves."""
    return sum(w.nbytes for w in jax.tree.leaves(params))


def matrices(params, rows: int) -> Work:
    """Every parameter of `params` read once and multiplied with `rows` rows."""
    size = sum(w.size for w in jax.tree.leaves(params))
    return Work(weight_bytes(params), 2.0 * size * rows)


def attention(config: ModelConfig, layers: int, rows: int, context: int, itemsize: int) -> Work:
    """Keys and values of `context` tokens read by `rows` rows in each of `layers` layers."""
    kv = 2.0 * context * config.num_kv_heads * config.head_dim * itemsize
    flops = 4.0 * rows * context * config.num_heads * config.head_dim
    return Work(layers * kv, layers * flops)


def target_pass(target, rows: int, context: int) -> Work:
    """One forward of the target over `rows` rows, head included (of the embedding, rows only)."""
    params, config = target.params, target.config
    read = {"layers": params["layers"], "norm": params["final_norm"], "head": head_VxD(params)}
    itemsize = params["embed"].dtype.itemsize
    return matrices(read, rows) + attention(config, config.num_layers, rows, context, itemsize)


def draft_pass(drafter: Drafter, params, target, context: int) -> Work:
    """One draft: the extend over depth + 1 committed rows and whatever steps follow it."""
    if isinstance(drafter, Vanilla):
        return Work()
    head = drafter.head(params, target.params)
    itemsize, extended = target.params["embed"].dtype.itemsize, drafter.depth + 1
    if isinstance(drafter, FastEagle):
        used = split_buffers(params)[0] | {"layers": params["layers"][: drafter.depth]}
        cache = attention(drafter.block, drafter.depth, extended, context, itemsize)
        return matrices(used, extended) + matrices(head, drafter.depth) + cache
    if isinstance(drafter, Eagle3):

        def step(rows, head_rows):
            cache = attention(drafter.block, 1, rows, context, itemsize)
            return matrices(params["midlayer"], rows) + matrices(head, head_rows) + cache

        first = matrices(params["fc"], extended) + step(extended, 1)
        return first + step(drafter.top_k, drafter.top_k) * (drafter.depth - 1)
    raise ValueError(f"drafter {drafter.name!r}: its work is not described here")
