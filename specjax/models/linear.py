"""The one matrix product of every layer, kept in one place because its layout decides CPU speed."""

import math

import jax.numpy as jnp


def linear(x_BxTxD, kernel):
    """x @ kernel, where kernel is [D, *out]; returns [B, T, *out] in x's dtype."""
    out_shape = kernel.shape[1:]
    B, T, D = x_BxTxD.shape
    flat = kernel.astype(x_BxTxD.dtype).reshape(D, math.prod(out_shape))
    return jnp.matmul(x_BxTxD.reshape(B * T, D), flat).reshape(B, T, *out_shape)


def readout(hidden_BxTxD, head_VxD):
    """Logits in float32: hidden @ head.T, the head stored [V, D] as checkpoints store it."""
    B, T, D = hidden_BxTxD.shape
    head = head_VxD.astype(hidden_BxTxD.dtype)
    logits = jnp.einsum(
        "nd,vd->nv", hidden_BxTxD.reshape(B * T, D), head, preferred_element_type=jnp.float32
    )
    return logits.reshape(B, T, -1)
