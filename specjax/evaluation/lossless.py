"""Verdicts on exactness: token identity at temperature 0, a test of the law above it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from specjax.generation import bucket
from specjax.models import transformer
from specjax.models.target import Target
from specjax.sampling import Sampling, filtered_probs

TIE = 1e-4  # top-two logit gap under which fp32 rounding may pick either token


def _padded(ids: list[int]) -> jnp.ndarray:
    row = np.zeros((1, bucket(len(ids))), np.int32)
    row[0, : len(ids)] = ids
    return jnp.asarray(row)


def top_two_gap(target: Target, ids: list[int]) -> float:
    """Gap between the target's two largest logits after the tokens `ids`."""
    logits_V = target.logits(_padded(ids))[0, len(ids) - 1]
    best = jax.lax.top_k(logits_V, 2)[0]
    return float(best[0] - best[1])


def identical_verdict(target: Target, pairs) -> dict:
    """Compares answers with vanilla's.

    Args:
      pairs: (prompt ids, vanilla's new tokens, the method's new tokens) of every turn.

    Returns:
      {"kind": "identical", "checked", "identical", "ties"}: a tie is an answer whose first
      divergence lies where the target's top two logits are closer than 1e-4.
    """
    same = ties = 0
    for prompt, reference, answer in pairs:
        if list(reference) == list(answer):
            same += 1
            continue
        shared = list(zip(reference, answer, strict=False))
        first = next((i for i, (a, b) in enumerate(shared) if a != b), len(shared))
        ties += top_two_gap(target, list(prompt) + list(reference[:first])) < TIE
    return {"kind": "identical", "checked": len(pairs), "identical": same, "ties": int(ties)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _moments(params, config, sampling: Sampling, tokens_BxT):
    """log p of each next token under the filtered law, with that law's mean and variance of it."""
    hidden = transformer.forward(params, config, tokens_BxT).hidden_BxTxD
    logits = transformer.logits_of(params, hidden)[:, :-1]

    def row(_, item):
        logits_V, token = item
        probs_V = filtered_probs(logits_V, sampling)
        logp_V = jnp.where(probs_V > 0, jnp.log(jnp.where(probs_V > 0, probs_V, 1.0)), 0.0)
        mean = jnp.sum(probs_V * logp_V)
        variance = jnp.sum(probs_V * (logp_V - mean) ** 2)
        return None, (logp_V[token], mean, variance, probs_V[token] > 0)

    _, moments = jax.lax.scan(row, None, (logits[0], tokens_BxT[0, 1:]))
    return moments


def distribution_verdict(target: Target, sampling: Sampling, answers) -> dict:
    """Tests whether sampled answers follow the target's law.

    Under the exact law the sum of log p(x_t) - E[log p] over all sampled tokens is a martingale
    whose variance is the sum of the conditional variances, so its standard score is asymptotically
    standard normal, stop tokens included. Every answer is re-scored by plain causal decoding.

    Args:
      answers: (prompt ids, new tokens) of every turn.

    Returns:
      {"kind": "distribution", "test", "p_value"}; a token that the filter forbids gives p = 0.
    """
    total = spread = 0.0
    count, forbidden = 0, False
    for prompt, new in answers:
        ids = list(prompt) + list(new)
        logp, mean, variance, allowed = jax.device_get(
            _moments(target.params, target.config, sampling, _padded(ids))
        )
        span = slice(len(prompt) - 1, len(ids) - 1)
        total += float(np.sum(logp[span] - mean[span]))
        spread += float(np.sum(variance[span]))
        forbidden |= not bool(np.all(allowed[span]))
        count += len(new)
    score = total / math.sqrt(spread) if spread > 0 else 0.0
    p_value = 0.0 if forbidden else math.erfc(abs(score) / math.sqrt(2))
    test = f"martingale z-test of log p, {count} tokens, z = {score:.2f}"
    return {"kind": "distribution", "test": test, "p_value": p_value}
