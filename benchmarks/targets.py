"""The target that a benchmark runs: the built-in one, a folder, or random weights of a geometry."""

import functools
import re

import jax
import jax.numpy as jnp

from configs.fasteagle import PUBLISHED
from specjax.models.config import ModelConfig
from specjax.models.known import KNOWN
from specjax.models.target import Target, load_target
from specjax.models.transformer import init_params

TARGET_HELP = (
    "'builtin', a Hugging Face folder, or random:HIDDENxFFNxLAYERSxVOCAB[:H:G:K] (heads, "
    "key/value heads and head size; random weights, tied embeddings)"
)
_RANDOM = re.compile(r"random:(\d+)x(\d+)x(\d+)x(\d+)(?::(\d+):(\d+):(\d+))?")


def random_config(spec: str, positions: int = 4096) -> ModelConfig:
    """The geometry of "random:HIDDENxFFNxLAYERSxVOCAB[:H:G:K]".

    Without H:G:K every query head has its own key/value head, of size 64, 48 or 32, whichever
    divides HIDDEN first.

    Raises:
      ValueError: another form, or a hidden size that none of these divides.
    """
    match = _RANDOM.fullmatch(spec)
    if match is None:
        raise ValueError(f"target: {spec!r} is not random:HIDDENxFFNxLAYERSxVOCAB[:H:G:K]")
    hidden, ffn, layers, vocab = map(int, match.groups()[:4])
    if match[5]:
        heads, kv_heads, head_dim = map(int, match.groups()[4:])
    else:
        sizes = [size for size in (64, 48, 32) if hidden % size == 0]
        if not sizes:
            raise ValueError(f"target: {spec!r}: hidden size {hidden} needs :H:G:K")
        head_dim = sizes[0]
        heads = kv_heads = hidden // head_dim
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=True,
        max_position_embeddings=positions,
    )  # fmt: skip


def get_target(spec: str, dtype: str = "float32", seed: int = 0) -> Target:
    """Loads or makes the target that `spec` names (see TARGET_HELP)."""
    if not spec.startswith("random:"):
        return load_target(spec, dtype)
    config = random_config(spec)
    params = init_params(jax.random.key(seed), config, jnp.dtype(dtype))
    return Target(spec, config, params, tokenizer=None)


GEOMETRY_HELP = (
    f"random bfloat16 weights of a published target's geometry, one of {tuple(PUBLISHED)}; time "
    "does not depend on the weights"
)


def geometry_target(name: str, layers: int = 0, dtype: str = "bfloat16") -> Target:
    """Random weights of a published geometry, cut to `layers` layers (0: all).

    Raises:
      ValueError: an unknown geometry, or one with fewer layers.
    """
    if name not in PUBLISHED:
        raise ValueError(f"geometry: {name!r} is unknown; one of {tuple(PUBLISHED)}")
    config = KNOWN[PUBLISHED[name][0]]
    if not 0 <= layers <= config.num_layers:
        raise ValueError(f"layers: {layers} must be in [0, {config.num_layers}] for {name}")
    config = config.replace(num_layers=layers or config.num_layers)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config, jnp.dtype(dtype)))

    # A leaf at a time and straight in its dtype: float32 twins of all would take twice the memory.
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def fill(key, shape, dtype):
        return (0.02 * jax.random.normal(key, shape)).astype(dtype)

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [fill(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return Target(name, config, jax.tree.unflatten(tree, made), tokenizer=None)
