"""Operations that training calls for, whatever the step does besides: what a share of peak is of.

XLA's own count takes a loop's body once, so it misses most of a scanned target and of a loss in
chunks, and counts what is recomputed in the backward pass as work.
"""

import dataclasses
from collections.abc import Callable

import jax

from specjax.distillation.deepkd import stream_gradients
from specjax.planning.program import trace
from specjax.training.objective import Objective, drafter_loss
from specjax.training.state import one_gradient


def products_of(fn: Callable, *args) -> dict[str, float]:
    """Operations of the matrix products of fn(*args), two for a multiply-add, by their precision.

    `args` are arrays or shapes; precisions are those of `planning.program`.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    return dict(trace(fn, *shapes).flops)


def step_products(definition, objective: Objective, params, frozen, batch) -> dict[str, float]:
    """Of one step: the target's forward, the drafter's forward and backward, teacher and loss.

    The same with and without chunks, rematerialisation and scanned layers; over all devices; the
    optimiser left out. Arguments as of `drafter_loss`.
    """
    plain = dataclasses.replace(objective, remat=False, chunk=0)
    differentiate = stream_gradients if objective.deepkd else one_gradient

    def gradient(params, frozen, batch):
        loss = lambda p: drafter_loss(definition, plain, p, frozen, batch, 0, frozen["key"])  # noqa: E731
        return differentiate(loss, params)

    return products_of(gradient, params, frozen, batch)


def model_flops(*args) -> float:
    """`step_products` of every precision together."""
    return sum(step_products(*args).values())
