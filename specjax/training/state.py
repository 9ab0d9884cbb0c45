"""What a training run carries from step to step, and the step that advances it."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint must hold: a restored state continues bit for bit."""

    step: jax.Array  # int32 scalar: steps done
    params: dict
    opt_state: optax.OptState


def create(params, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step; it is donated, so all leaves have memory of their own."""
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    return jax.tree.map(jnp.copy, state)


def one_gradient(loss_fn: Callable, params):
    """(loss, gradient, metrics) of a scalar loss."""
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, grads, metrics


def make_step(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    differentiate: Callable = one_gradient,
) -> Callable:
    """Jits one optimisation step, the state donated.

    Args:
      loss_fn: (params, frozen, batch, step) -> (scalar loss, dict of scalar metrics); `frozen` is
        what the loss needs but does not train (the target), passed through so that it is an
        argument of the compiled step and not a constant inside it.
      optimizer: an optax transformation.
      differentiate: (params -> (loss, metrics), params) -> (losses, what the optimiser takes for a
        gradient, metrics); losses are added up for the log.

    Returns:
      (state, frozen, batch) -> (state, metrics); metrics always hold `loss` and `grad_norm`.
    """

    def step(state: TrainState, frozen, batch):
        loss, grads, metrics = differentiate(
            lambda params: loss_fn(params, frozen, batch, state.step), state.params
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"loss": jnp.sum(loss), "grad_norm": optax.global_norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)
