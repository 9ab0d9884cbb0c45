"""The one matrix product of every layer, kept in one place because its layout decides CPU speed."""

import jax.numpy as jnp

from specjax.sharding import rows_over_mesh


def linear(x_BxTxD, kernel):
    """x @ kernel, where kernel is [D, *out]; returns [B, T, *out] in x's dtype."""
    B, T, D = x_BxTxD.shape
    x_BxTxD = rows_over_mesh(x_BxTxD, whole=False)
    # The kernel keeps its axes: flattened, one that is split over devices but is not the first
    # (the F of Dx2xF) would have to be gathered before every product.
    out = jnp.tensordot(x_BxTxD.reshape(B * T, D), kernel.astype(x_BxTxD.dtype), axes=1)
    return rows_over_mesh(out.reshape(B, T, *kernel.shape[1:]), whole=False)


def readout(hidden_BxTxD, head_VxD):
    """Logits in float32: hidden @ head.T, the head stored [V, D] as checkpoints store it."""
    B, T, D = hidden_BxTxD.shape
    head = head_VxD.astype(hidden_BxTxD.dtype)
    logits = jnp.einsum(
        "nd,vd->nv", hidden_BxTxD.reshape(B * T, D), head, preferred_element_type=jnp.float32
    )
    return logits.reshape(B, T, -1)
