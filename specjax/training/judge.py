"""Trains the linear head of Judge Decoding on labelled continuations.

Source: Bachmann et al. 2501.19309: answers are labelled token by token, right up to the first
mistake, and a logistic regression on the target's last hidden state at each token learns to tell
the two apart. The paper weights the rarer class; `wrong_weight` does.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from specjax.generation import pad_to_bucket
from specjax.models import transformer
from specjax.models.config import ModelConfig
from specjax.models.target import Target
from specjax.verification.judge import JudgeHead


@dataclass(frozen=True)
class Labelled:
    """One continuation: after `prompt`, token i of `tokens` is acceptable or (False) a mistake."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    acceptable: Sequence[bool]

    def __post_init__(self):
        if not len(self.tokens) == len(self.acceptable) > 0:
            raise ValueError(
                f"labelled continuation: {len(self.tokens)} tokens and {len(self.acceptable)} "
                "labels; one label for each token expected"
            )


@functools.partial(jax.jit, static_argnums=1)
def _hidden(params, config: ModelConfig, tokens_BxT):
    return transformer.forward(params, config, tokens_BxT).hidden_BxTxD


def token_features(target: Target, ids: Sequence[int]) -> np.ndarray:
    """The LM head's input *at* each token (after it was consumed), TxD float32."""
    hidden_BxTxD = _hidden(target.params, target.config, pad_to_bucket([ids]))
    return np.asarray(hidden_BxTxD, np.float32)[0, : len(ids)]


def fit_judge(
    target: Target,
    examples: Sequence[Labelled],
    wrong_weight: float = 1.0,
    penalty: float = 1e-3,
) -> JudgeHead:
    """Logistic regression on standardised features, by L-BFGS.

    Args:
      examples: labelled continuations; both labels must occur.
      wrong_weight: weight of a mistake against an acceptable token.
      penalty: L2 penalty on the weights of standardised features.

    Raises:
      ValueError: only one of the two labels occurs.
    """
    features, labels = [], []
    for example in examples:
        rows = token_features(target, [*example.prompt, *example.tokens])
        features.append(rows[len(example.prompt) :])
        labels.append(np.asarray(example.acceptable, bool))
    x_NxD, y_N = np.concatenate(features).astype(np.float64), np.concatenate(labels)
    if y_N.all() or not y_N.any():
        raise ValueError("fit_judge: both acceptable tokens and mistakes are needed")
    mean_D, std_D = x_NxD.mean(axis=0), x_NxD.std(axis=0) + 1e-6
    z_NxD = (x_NxD - mean_D) / std_D
    weight_N = np.where(y_N, 1.0, wrong_weight)
    weight_N /= weight_N.sum()

    def loss(theta):
        margin = z_NxD @ theta[:-1] + theta[-1]
        value = weight_N @ np.logaddexp(0, np.where(y_N, -margin, margin))
        slope = weight_N * (expit(margin) - y_N)
        gradient = np.append(z_NxD.T @ slope + penalty * theta[:-1], slope.sum())
        return value + 0.5 * penalty * theta[:-1] @ theta[:-1], gradient

    theta = minimize(loss, np.zeros(z_NxD.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return JudgeHead(theta[:-1] / std_D, theta[-1] - theta[:-1] @ (mean_D / std_D))
