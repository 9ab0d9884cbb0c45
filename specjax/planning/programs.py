"""The programs of a run, read at the shapes of one device: training step, prefill, round."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from specjax import decoding
from specjax.distillation.deepkd import stream_gradients
from specjax.drafters import Drafter, Vanilla
from specjax.generation import cache_slots
from specjax.models.config import ModelConfig
from specjax.planning import shards
from specjax.planning.program import Needs, trace
from specjax.training.drafter import needs_reference
from specjax.training.objective import drafter_loss, make_objective
from specjax.training.optimizers import make_optimizer
from specjax.training.state import TrainState, one_gradient
from specjax.verification import get_rule

STEP_FIELDS = (
    "steps",
    "batch_size",
    "optimizer",
    "loss",
)  # of config.train: what a step depends on


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

    @functools.cached_property
    def params(self):
        """Its parameters as shapes, whole."""
        return shards.target_shapes(self.config, self.dtype, self.scan_layers)

    @functools.cached_property
    def here(self) -> ModelConfig:
        """The geometry that one device computes with."""
        return shards.share_of_model(self.mesh, self.config, self.params)

    @functools.cached_property
    def params_here(self):
        """What one device reads: its share of heads, width and vocabulary, gathered over fsdp."""
        return shards.target_shapes(self.here, self.dtype, self.scan_layers)


def training_step(model: Model, definition: Drafter, cfg: ConfigDict, length: int):
    """(needs of the gradient, of the update, bytes of gradients on a device).

    Raises:
      ValueError: the mesh does not divide the batch, or the objective cannot be had.
    """
    recipe = {k: v for k, v in cfg.to_dict().items() if k in STEP_FIELDS}
    return _training_step(model, definition, json.dumps(recipe, sort_keys=True), length)


@functools.lru_cache(maxsize=256)
def _training_step(model: Model, definition: Drafter, recipe: str, length: int):
    cfg = ConfigDict(json.loads(recipe))
    objective = make_objective(cfg.loss, cfg.steps)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps, objective.deepkd)
    whole, _ = shards.drafter_shapes(definition, model.params)
    here = shards.share_of_drafter(model.mesh, definition, whole, model.here)
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

    shards.batch_share(model.mesh, cfg.batch_size)  # refused here if it does not divide
    batch = batch_shapes(cfg.batch_size // model.mesh.shape["data"], length)
    args = params, frozen, batch, _int32()
    held = shards.shard_shapes(model.mesh, whole, shards.rules_of(definition))
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

    first = trace(gradient, *args, out_bytes=sizes).over(model.mesh.shape["fsdp"])
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


def engine_of(config: ModelConfig, definition: Drafter | None, sampling, rule: str = ""):
    """The static half of decoding, as `generation.make_engine` settles it."""
    definition = Vanilla(config) if definition is None else definition
    rule = get_rule(rule or definition.default_rule)
    if sampling.greedy and rule.exact:
        rule = get_rule("greedy")
    return decoding.Engine(config, definition.drawn(rule.draws, sampling), rule, sampling)


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
def decode(model: Model, definition: Drafter | None, request: Request, slots: int, sampling, rule):
    """What decoding a batch takes on one device, the batch whole and the heads its share of them.

    Requests are not split over "data": every group of devices decodes the same batch.
    """
    params = {"target": model.params_here, "drafter": {}}
    here = None
    if definition is not None:
        whole, _ = shards.drafter_shapes(definition, model.params)
        here = shards.share_of_drafter(model.mesh, definition, whole, model.here)
        trained, buffers = shards.drafter_shapes(here, model.params_here)
        params["drafter"] = trained | ({"buffers": buffers} if buffers else {})
    engine = engine_of(model.here, here, sampling, rule)
    state = decode_state(engine, params, request, slots)
    B, P = request.batch, request.prompt

    def fill(target, tokens, lengths):
        return decoding._prefill_target(
            engine.config, engine.drafter.taps, target, tokens, lengths, slots
        )

    first = trace(fill, params["target"], _int32(B, P), _int32(B))
    step = trace(functools.partial(decoding.round, engine), params, state, donate=(1,))
    caches, ways = shards.whole_bytes((state.cache.k, state.cache.v)), model.mesh.shape["fsdp"]
    return Decoding(first.over(ways), step.over(ways), caches, shards.whole_bytes(state.drafter))
