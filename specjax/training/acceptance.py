"""Fits the acceptance head of SpecDec++ to a draft model that stays as it is.

Source: Huang et al. 2405.19715. At every position of the target's text the draft model draws a
token y; its label is min(1, p(y)/q(y)), the probability that speculative sampling accepts it. The
model then reads a text in which each token is its own draw or, now and then, the target's (not
trained on), and the head, at the state that has read a draw, predicts the label: cross-entropy in
which rejections weigh more, divided by the weights there are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from specjax.drafters.base import split_buffers
from specjax.drafters.draft_model import DraftModel
from specjax.drafters.rasd import Rasd
from specjax.drafters.stopping import acceptance_logit, init_head
from specjax.models import transformer
from specjax.models.target import Target
from specjax.progress import say
from specjax.trained import TrainedDrafter

TARGET_SHARE = 0.15  # of the tokens read that are the target's
REJECTION_WEIGHT = 6.0


def model_of(drafter: TrainedDrafter) -> DraftModel | None:
    """The draft model that a drafter is, or that `rasd` has inside."""
    definition = drafter.definition
    inner = definition.inner if isinstance(definition, Rasd) else definition
    return inner if isinstance(inner, DraftModel) else None


def wants_acceptance_head(drafter: TrainedDrafter) -> bool:
    """Whether a drafter stops by predicted acceptance."""
    model = model_of(drafter)
    return model is not None and model.stop == "specdec"


def weighted_loss(logits, labels, weight: float = REJECTION_WEIGHT, where=None):
    """Cross-entropy against soft labels, rejections `weight` times as heavy, per unit of weight."""
    where = jnp.ones_like(labels) if where is None else where
    accepted, rejected = labels * where, weight * (1 - labels) * where
    loss = accepted * jax.nn.softplus(-logits) + rejected * jax.nn.softplus(logits)
    return jnp.sum(loss) / jnp.maximum(jnp.sum(accepted + rejected), 1e-6)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _states_and_labels(definition, config, params, target_params, rows, key):
    """(states that read a token BxTxD, its label, whether it counts) of one batch of texts."""
    tokens_BxT = rows["tokens"]
    layout = positions_BxT, _ = transformer.text_layout(tokens_BxT, rows.get("segments"))
    draw_key, mix_key = jax.random.split(key)
    p = jax.nn.log_softmax(
        transformer.logits_of(
            target_params,
            transformer.forward(target_params, config, tokens_BxT, *layout).hidden_BxTxD,
        )
    )
    own = transformer.forward(params, definition.model, tokens_BxT, *layout)
    q = jax.nn.log_softmax(transformer.logits_of(params, own.hidden_BxTxD))
    drawn_BxT = jax.random.categorical(draw_key, q)  # row t draws x_{t+1}
    at = lambda logp: jnp.take_along_axis(logp, drawn_BxT[..., None], axis=-1)[..., 0]  # noqa: E731
    label_BxT = jnp.exp(jnp.minimum(at(p) - at(q), 0.0))
    shift = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))  # noqa: E731
    given = jax.random.uniform(mix_key, tokens_BxT.shape) < TARGET_SHARE
    given |= positions_BxT == 0
    read_BxT = jnp.where(given, tokens_BxT, shift(drawn_BxT))
    states = transformer.forward(params, definition.model, read_BxT, *layout).hidden_BxTxD
    return states, shift(label_BxT), ~given & rows["supervised"]


def fit_acceptance(
    target: Target, drafter: TrainedDrafter, batch_fn, steps: int, learning_rate=1e-3, seed: int = 0
) -> tuple[TrainedDrafter, float]:
    """(the drafter with a head fitted and stop="specdec", the last loss).

    Args:
      drafter: a `draft_model`, or `rasd` around one; a head that it has is replaced.
      batch_fn: step -> rows of text.

    Raises:
      ValueError: no draft model.
    """
    definition, (params, buffers) = model_of(drafter), split_buffers(drafter.params)
    if definition is None:
        raise ValueError(f"drafter: {drafter.name!r} is no 'draft_model', nor 'rasd' around one")
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def step(head, opt_state, states, labels, counts):
        def loss_of(head):
            logits = acceptance_logit(head, states)
            return weighted_loss(logits, labels, where=counts.astype(jnp.float32))

        loss, grads = jax.value_and_grad(loss_of)(head)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(head, updates), opt_state, loss

    head = init_head(jax.random.fold_in(jax.random.key(seed), steps), definition.model.hidden_size)
    opt_state, loss = optimizer.init(head), jnp.nan
    for index in range(steps):
        rows = batch_fn(index)
        key = jax.random.fold_in(jax.random.key(seed), index)
        batch = _states_and_labels(definition, target.config, params, target.params, rows, key)
        head, opt_state, loss = step(head, opt_state, *batch)
    say(f"{drafter.name}: acceptance head fitted in {steps} steps, loss {float(loss):.3f}")
    params = drafter.params | {"buffers": buffers | {"acceptance": head}}
    stop = {"stop": "specdec"}
    fitted = drafter.with_budget(**({"inner_options": stop} if drafter.name == "rasd" else stop))
    return dataclasses.replace(fitted, params=params), float(loss)
