"""How a tree's tokens come out of a drafter's distributions: the best ones, or sampled ones.

Rules that compare p with q need tokens that were really drawn from q, and q as it was when they
were drawn, after the same temperature, top-k and top-p as the target's.
"""

import dataclasses

import jax
import jax.numpy as jnp

from specjax.sampling import GREEDY, Sampling, categorical, filtered_probs

KINDS = ("top", "without_replacement", "with_replacement", "chains")
"""top: the most probable tokens, no law. without_replacement, with_replacement: siblings drawn one
after another. chains: independent chains from the root."""

# Log-probability that stands for zero when drawing without replacement: far below any float32
# probability's, and small enough that the Gumbel noise on it survives rounding. Tokens of
# probability zero are thus drawn last, uniformly.
_OUT = -1000.0


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One kind of drawing under one filter."""

    kind: str = "top"
    sampling: Sampling = GREEDY

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"proposal: {self.kind!r} is unknown; one of {KINDS}")

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.kind != "top"


def log_law(logits, sampling: Sampling):
    """log q over the last axis after the shared filter; -inf where nothing can be drawn.

    A row without a finite maximum, as broken weights give, is the uniform law: the rules stay exact
    only if what is recorded is what is drawn from.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    rows = jnp.where(jnp.isfinite(jnp.max(rows, axis=-1, keepdims=True)), rows, 0.0)
    probs = jax.vmap(lambda row: filtered_probs(row, sampling))(rows).reshape(logits.shape)
    return jnp.where(probs > 0, jnp.log(jnp.where(probs > 0, probs, 1.0)), -jnp.inf)


def draw_children(key, logq_V, count: int, kind: str):
    """`count` tokens of one law in draw order, int32.

    Without replacement by Gumbel-top-k (the order of the perturbed values is the order of drawing);
    where the law has fewer tokens than that, the rest is drawn uniformly from those left.
    """
    if kind == "without_replacement":
        noise = jax.random.gumbel(key, logq_V.shape)
        _, tokens = jax.lax.top_k(jnp.maximum(logq_V, _OUT) + noise, count)
        return tokens.astype(jnp.int32)
    uniforms = jax.random.uniform(key, (count,))
    return jax.vmap(categorical, (0, None))(uniforms, jnp.exp(logq_V))


def beam_step(key, phi_K, perturbed_K, logq_KxV, width: int):
    """One level of stochastic beam search (Kool et al. 2019), as RSD-S drafts.

    Args:
      key: fresh noise.
      phi_K, perturbed_K: log-probability and perturbed log-probability of each beam; -inf is out.
      logq_KxV: each beam's conditional law.
      width: beams to keep.

    Returns:
      (token, beam it grew from, phi, perturbed value) of the `width` best, best first. A sibling
      that comes earlier was drawn earlier; perturbed values of -inf mark entries that do not exist.
    """
    V = logq_KxV.shape[1]
    phi_KxV = phi_K[:, None] + logq_KxV
    raw_KxV = phi_KxV + jax.random.gumbel(key, phi_KxV.shape)
    best_Kx1 = jnp.max(raw_KxV, axis=1, keepdims=True)
    alive = jnp.isfinite(raw_KxV) & jnp.isfinite(perturbed_K)[:, None]
    safe = lambda x: jnp.where(alive, x, 0.0)  # noqa: E731
    top_KxV = safe(jnp.broadcast_to(perturbed_K[:, None], raw_KxV.shape))
    # Conditioned on the maximum being the parent's value, in a form that does not cancel.
    gap_KxV = safe(raw_KxV - best_Kx1)
    is_best = gap_KxV >= 0
    slack = jnp.log1p(-jnp.exp(jnp.where(is_best, -1.0, gap_KxV)))
    v_KxV = top_KxV - safe(raw_KxV) + slack
    moved = top_KxV - jnp.maximum(0.0, v_KxV) - jnp.log1p(jnp.exp(-jnp.abs(v_KxV)))
    value_KxV = jnp.where(alive, jnp.where(is_best, top_KxV, moved), -jnp.inf)
    perturbed, place = jax.lax.top_k(value_KxV.reshape(-1), width)
    beam = (place // V).astype(jnp.int32)
    return (place % V).astype(jnp.int32), beam, phi_KxV.reshape(-1)[place], perturbed
