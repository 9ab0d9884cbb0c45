"""The programs of a run, read at the shapes of one device: training step, prefill, round."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from specjax import decoding, sharding
from specjax.distillation.deepkd import stream_gradients
from specjax.drafters import Drafter, Vanilla
from specjax.generation import cache_slots, settled
from specjax.models.config import ModelConfig
from specjax.planning import shards
from specjax.planning.program import Needs, trace
from specjax.training.drafter import needs_reference
from specjax.training.objective import drafter_loss, make_objective
from specjax.training.optimizers import make_optimizer
from specjax.training.state import TrainState, one_gradient

# Of config.train: what a step depends on.
STEP_FIELDS = ("steps", "batch_size", "optimizer", "loss", "remat")


def key_shape():
    """A random key as a shape."""
    return jax.eval_shape(lambda: jax.random.key(0))


def _int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def state_shapes(params, optimizer) -> TrainState:
    """The state before the first step, as shapes."""
    return TrainState(_int32(), params, jax.eval_shape(optimizer.init, params))


def batch_shapes(batch: int, length: int) -> dict:
    """A training batch as shapes."""
    return {
        "tokens": _int32(batch, length),
        "supervised": jax.ShapeDtypeStruct((batch, length), jnp.bool_),
    }


@dataclasses.dataclass(frozen=True)
class Model:
    """The target: what it is, and what one device holds and computes with."""

    config: ModelConfig
    dtype: str
    scan_layers: bool
    mesh: object
    rules: sharding.Rules = sharding.MODEL_RULES

    @functools.cached_property
    def params(self):
        """Its parameters as shapes, whole."""
        return shards.target_shapes(self.config, self.dtype, self.scan_layers)

    @functools.cached_property
    def here(self) -> ModelConfig:
        """The geometry that one device computes with."""
        return shards.share_of_model(self.mesh, self.config, self.params, self.rules)

    @functools.cached_property
    def params_here(self):
        """What one device reads: its share of heads, width and vocabulary, gathered over fsdp."""
        return shards.target_shapes(self.here, self.dtype, self.scan_layers)


def training_step(
    model: Model, definition: Drafter, cfg: ConfigDict, length: int, rules: sharding.Rules
):
    """(needs of the gradient, of the update, bytes of gradients on a device).

    Raises:
      ValueError: the mesh does not divide the batch, or the objective cannot be had.
    """
    recipe = {k: v for k, v in cfg.to_dict().items() if k in STEP_FIELDS}
    return _training_step(model, definition, json.dumps(recipe, sort_keys=True), length, rules)


@functools.lru_cache(maxsize=256)
def _training_step(model: Model, definition: Drafter, recipe: str, length: int, rules):
    cfg = ConfigDict(json.loads(recipe))
    objective = make_objective(cfg.loss, cfg.steps, cfg.remat)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps, objective.deepkd)
    whole, _ = shards.drafter_shapes(definition, model.params)
    here = shards.share_of_drafter(model.mesh, definition, whole, model.here, rules)
    params, buffers = shards.drafter_shapes(here, model.params_here)
    frozen = {"key": key_shape(), "target": model.params_here, "buffers": buffers}
    if needs_reference(cfg):
        frozen["reference"] = params
    differentiate = stream_gradients if objective.deepkd else one_gradient

    def gradient(params, frozen, batch, step):
        key = jax.random.fold_in(frozen["key"], step)
        loss = lambda p: drafter_loss(here, objective, p, frozen, batch, step, key)  # noqa: E731
        loss, grads, metrics = differentiate(loss, params)
        return grads, loss, metrics

    batch = batch_shapes(shards.batch_share(model.mesh, cfg.batch_size), length)
    args = params, frozen, batch, _int32()
    held = shards.shard_shapes(model.mesh, whole, rules)
    streams = objective.streams
    sizes = tuple(streams * shards.nbytes(leaf) for leaf in jax.tree.leaves(held))  # of gradients
    state = state_shapes(held, optimizer)
    grads = held
    if streams > 1:
        grads, _, _ = jax.eval_shape(gradient, *args)
        grads = jax.tree.map(
            lambda g, p: jax.ShapeDtypeStruct((*g.shape[: g.ndim - p.ndim], *p.shape), g.dtype),
            grads, held,
        )  # fmt: skip

    def update(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(
            state.step + 1, optax.apply_updates(state.params, updates), opt_state
        ), optax.global_norm(grads)

    first = trace(gradient, *args, out_bytes=sizes).holding(
        "weights gathered over fsdp", shards.gathered_bytes(model, params, held)
    )
    second = trace(update, state, grads, donate=(0, 1))
    return first, second, sum(sizes)


# ---- decoding --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
    """The shapes of a batch of requests."""

    batch: int
    prompt: int  # tokens of the padded prompts
    new: int

    def slots(self, engines) -> int:
        """S that suits every one of `engines`."""
        return max(self.prompt, *(cache_slots(e, self.prompt, self.new) for e in engines))


def engine_of(
    config: ModelConfig, definition: Drafter | None, sampling, rule: str = "", layout=None
):
    """The static half of decoding, for a target on paper."""
    definition = Vanilla(config) if definition is None else definition
    definition, rule = settled(definition, sampling, rule or None)
    return decoding.Engine(config, definition, rule, sampling, layout=layout)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What decoding one batch needs on a device."""

    prefill: Needs
    round: Needs
    cache: int  # bytes of the target's keys and values
    state: int  # bytes of the drafter's state

    @property
    def peak(self) -> int:
        """Most bytes beyond the parameters: in prefill, which makes the cache, or in a round."""
        return max(self.prefill.peak, self.cache + self.state + self.round.peak)


def decode_state(engine, params, request: Request, slots: int):
    """(cache, taps) after the target's prefill and the state before the first round, as shapes."""
    B, P = request.batch, request.prompt
    prefill = functools.partial(
        decoding._prefill_target, engine.config, engine.drafter.taps, slots=slots
    )
    cache, logits, taps = jax.eval_shape(prefill, params["target"], _int32(B, P), _int32(B))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    first = functools.partial(decoding._first_state, engine, rounds=slots)
    return jax.eval_shape(
        first, params, cache, logits, taps, _int32(B, P), _int32(B), _int32(B), keys
    )


@functools.lru_cache(maxsize=256)
def decode(
    model: Model,
    definition: Drafter | None,
    request: Request,
    slots: int,
    sampling,
    rule: str = "",
    rules: sharding.Rules = (),
):
    """What decoding a batch takes on one device: its share of the rows, where data and fsdp divide
    the batch, and of the heads.

    Args:
      rules: of the drafter's parameters.
    """
    params = {"target": model.params_here, "drafter": {}}
    here = None
    if definition is not None:
        whole, _ = shards.drafter_shapes(definition, model.params)
        here = shards.share_of_drafter(model.mesh, definition, whole, model.here, rules)
        trained, buffers = shards.drafter_shapes(here, model.params_here)
        params["drafter"] = trained | ({"buffers": buffers} if buffers else {})
    engine = engine_of(model.here, here, sampling, rule)
    B, P = shards.rows_here(model.mesh, request.batch), request.prompt
    state = decode_state(engine, params, dataclasses.replace(request, batch=B), slots)

    def fill(target, tokens, lengths):
        return decoding._prefill_target(
            engine.config, engine.drafter.taps, target, tokens, lengths, slots
        )

    first = trace(fill, params["target"], _int32(B, P), _int32(B))
    step = trace(functools.partial(decoding.round, engine), params, state, donate=(1,))
    caches = shards.whole_bytes((state.cache.k, state.cache.v))
    # Devices of one row of the mesh that have the same rows share the sums of their products.
    ways = model.mesh.shape["fsdp"] if B == request.batch else 1
    return Decoding(first.over(ways), step.over(ways), caches, shards.whole_bytes(state.drafter))
