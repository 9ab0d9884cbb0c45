"""Rotary position embedding in the rotate-half convention of Hugging Face checkpoints."""

import jax.numpy as jnp
import numpy as np

from specjax.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequency per rotated pair, [K/2] float32, after `config.rope_scaling`.

    `linear` divides every frequency by the factor (positional interpolation). `llama3` divides
    only wavelengths longer than the original context and blends in between (Llama 3.1).
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequency = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling.kind == "llama3":
        context = scaling.original_max_position_embeddings
        # Turns that a pair makes over the original context decide how much of it is stretched.
        turns = context * frequency / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    return frequency.astype(np.float32)


def rope_tables(config: ModelConfig, positions_BxT):
    """(cos, sin), each BxTx(K/2) float32, for integer positions."""
    angle = positions_BxT[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BxTxHxK, cos_BxTxJ, sin_BxTxJ):
    """Rotates pairs (j, j + K/2) of the last axis; every head gets the same angles."""
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BxTxJ[:, :, None], sin_BxTxJ[:, :, None]
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x_BxTxHxK.dtype)
