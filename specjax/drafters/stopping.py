"""When a drafter that works token by token stops: policies that look at the draft alone.

A policy sees the probabilities of drafted tokens and the draft model's states, never the target's,
so that any exact rule stays exact. Sources: a confidence threshold, as in Kangaroo (2404.18911);
SpecDec++ (2405.19715), which stops when the product of predicted acceptances says that a rejection
has become likely.
"""

import jax
import jax.numpy as jnp

POLICIES = ("fixed", "confidence", "specdec")
BLOCKS = 3  # residual blocks of the acceptance head


def init_head(key, size: int) -> dict:
    """The acceptance head: blocks x + silu(W x + b), each with weights of its own, then a logit."""
    keys = jax.random.split(key, BLOCKS + 1)
    blocks = [
        {"kernel": jax.random.normal(k, (size, size)) * size**-0.5, "bias": jnp.zeros(size)}
        for k in keys[1:]
    ]
    readout = {"kernel": jax.random.normal(keys[0], (size, 1)) * size**-0.5, "bias": jnp.zeros(1)}
    return {"blocks": blocks, "readout": readout}


def neutral_head(size: int) -> dict:
    """A head that expects every token to be accepted: until it is fitted it stops nothing."""
    shapes = jax.eval_shape(lambda key: init_head(key, size), jax.random.key(0))
    head = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    head["readout"]["bias"] += 100.0  # its sigmoid is 1 in float32
    return head


def acceptance_logit(head: dict, states):
    """Logit of the predicted acceptance of the token that a state (last axis D) has just read."""
    x = states.astype(jnp.float32)
    for block in head["blocks"]:
        x = x + jax.nn.silu(x @ block["kernel"] + block["bias"])
    return (x @ head["readout"]["kernel"] + head["readout"]["bias"])[..., 0]
