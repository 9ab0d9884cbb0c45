"""A run on paper: what its target and each of its drafters take on one device, stage by stage."""

import dataclasses
import functools

import jax
from ml_collections import ConfigDict

from specjax import sharding
from specjax.drafters import Drafter
from specjax.generation import bucket
from specjax.planning import shards
from specjax.planning.accelerators import Accelerator
from specjax.planning.programs import (
    Decoding,
    Model,
    Request,
    decode,
    engine_of,
    state_shapes,
    training_step,
)
from specjax.planning.roofline import Time, all_reduce, roofline
from specjax.sampling import GREEDY, Sampling
from specjax.training.objective import make_objective
from specjax.training.optimizers import make_optimizer

UNKNOWN_PROMPT = 1024
"""Tokens assumed of prompts where `max_prompt_tokens`, `eval`'s or `data`'s, is 0: all of them."""
CHECKPOINTS = 2  # that `training.checkpoints` keeps of each drafter


@dataclasses.dataclass(frozen=True)
class Contender:
    """A drafter of the run: its trees, the shared one first, and its training."""

    name: str
    definition: Drafter
    trees: tuple[Drafter, ...]
    train: ConfigDict | None  # None: nothing is trained
    rules: sharding.Rules  # of its parameters and their optimiser's state


@dataclasses.dataclass(frozen=True)
class Training:
    """One drafter's training; bytes are those of one device."""

    weights: int  # float32
    optimizer: int
    gradients: int
    temporaries: int  # beside the gradients, at the peak
    alive: tuple[tuple[str, int], ...]  # the largest of them
    tokens: int  # of one step, all devices
    steps: int
    step: Time

    @property
    def bytes(self) -> int:
        """All of it, the target not included."""
        return self.weights + self.optimizer + self.gradients + self.temporaries


@dataclasses.dataclass(frozen=True)
class Method:
    """One drafter (name "vanilla": none)."""

    name: str
    parameters: int
    initial: int  # bytes that a device keeps of its untrained parameters
    weights: int  # bytes that a device keeps of the trained ones
    training: Training | None
    decoding: Decoding
    round: Time
    nodes: int
    stored: int  # bytes of its files
    checkpoints: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """All that is known of a run before it starts. Bytes are those of one device."""

    chip: Accelerator
    devices: int
    mesh: tuple[int, int, int]
    target_parameters: int
    target: int
    loading: int  # bytes while its layers are stacked
    prompt: int  # tokens of an evaluation prompt, padded
    slots: int
    regeneration: Decoding
    regeneration_round: Time
    methods: tuple[Method, ...]
    text: int  # bytes on disk
    features: int  # bytes that storing the target's features would take

    @property
    def stages(self) -> dict[str, int]:
        """Stage -> bytes on one device at its peak."""
        trained = [m for m in self.methods if m.training]
        initial = sum(m.initial for m in self.methods)
        stages = {"load": self.target + self.loading}
        stages["regenerate"] = self.target + self.regeneration.peak
        for i, m in enumerate(trained):
            done = sum(other.weights for other in trained[:i])
            stages[f"train {m.name}"] = self.target + initial + done + m.training.bytes
        kept = sum(m.weights for m in self.methods)
        states = sum(m.decoding.cache + m.decoding.state for m in self.methods)  # timed in turns
        for m in self.methods:
            most = max(m.decoding.prefill.peak, states + m.decoding.round.peak)
            stages[f"decode {m.name}"] = self.target + kept + most
        return stages

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return max(self.stages.values())

    @property
    def worst(self) -> str:
        """The first word of the largest stage: what has to shrink."""
        stages = self.stages
        return max(stages, key=lambda name: stages[name]).split()[0]

    @property
    def fits(self) -> bool:
        """Whether every stage fits the chip."""
        return self.peak <= self.chip.memory

    @property
    def disk(self) -> dict[str, int]:
        """What the run folder will hold."""
        return {
            "checkpoints": sum(m.checkpoints for m in self.methods),
            "drafters": sum(m.stored for m in self.methods),
            "text": self.text,
        }


def model_of(config: ConfigDict, target, mesh) -> Model:
    """The target of a config, as it lies on a mesh."""
    rules = (*config.sharding_rules, *sharding.MODEL_RULES)
    return Model(target, config.target.dtype, config.target.scan_layers, mesh, rules)


def bucketed(config: ConfigDict, target) -> int:
    """Padded tokens of an evaluation prompt."""
    limit = target.max_position_embeddings - config.eval.max_new_tokens
    return bucket(min(config.eval.max_prompt_tokens or UNKNOWN_PROMPT, limit))


def estimate(config: ConfigDict, target, contenders, mesh, chip: Accelerator) -> Estimate:
    """Reads the run that `config` describes.

    Args:
      config: a recipe's; `data`, `train` and `eval` are read.
      target: the target's geometry.
      contenders: the drafters.
      mesh: real, simulated or abstract.
      chip: what it is to run on.

    Raises:
      ValueError: a batch that the mesh does not divide, or settings that no program can have.
    """
    model = model_of(config, target, mesh)
    drafters = {c.name: shards.drafter_shapes(c.definition, model.params)[0] for c in contenders}
    sharding.check_rules([model.params, drafters], config.sharding_rules)
    held = shards.device_bytes(mesh, model.params, model.rules)
    layers = shards.device_bytes(mesh, {"layers": model.params["layers"]}, model.rules)
    temperature = max(config.eval.temperatures)
    sampling = Sampling(temperature, config.eval.top_k, config.eval.top_p)
    request = Request(config.eval.batch, bucketed(config, target), config.eval.max_new_tokens)
    rule = config.eval.rule
    trees = [t for c in contenders for t in c.trees]
    engines = [engine_of(target, None, GREEDY), *(engine_of(target, t, GREEDY) for t in trees)]
    slots = request.slots(engines)
    plain = decode(model, None, request, slots, sampling)
    sends = functools.partial(_forward_sends, model)
    vanilla = Method(
        "vanilla", 0, 0, 0, None, plain,
        roofline(chip, plain.round, link_bytes=sends(request.batch)), 1, 0, 0,
    )  # fmt: skip
    methods = [vanilla]
    for c in contenders:
        methods.append(_method(config, model, c, request, slots, sampling, rule, chip))
    prompts = bucket(config.data.max_prompt_tokens or UNKNOWN_PROMPT)
    writing = Request(config.data.batch, prompts, config.data.max_new_tokens)
    own = Sampling(config.data.temperature)
    written = decode(model, None, writing, writing.slots(engines[:1]), own)
    tokens = config.data.count * config.data.length
    width = (len(target.feature_layers()) + 1) * target.hidden_size
    return Estimate(
        chip=chip, devices=mesh.size, mesh=tuple(mesh.shape.values()),
        target_parameters=shards.count(model.params), target=held,
        loading=layers if config.target.scan_layers else 0, prompt=request.prompt, slots=slots,
        regeneration=written,
        regeneration_round=roofline(chip, written.round, link_bytes=sends(writing.batch)),
        methods=tuple(methods), text=8 * config.data.count * config.data.max_new_tokens,
        features=tokens * width * shards.itemsize(config.target.dtype),
    )  # fmt: skip


def _forward_sends(model: Model, rows: int) -> float:
    """Bytes a device sends in one forward of the target over its `rows` rows.

    Over "tensor" two sums a layer; over "fsdp" its share of every weight to those that gather it.
    """
    shape, here, width = model.mesh.shape, model.here, shards.itemsize(model.dtype)
    sums = 2 * all_reduce(rows * here.hidden_size * width, shape["tensor"])
    held = shards.device_bytes(model.mesh, model.params, model.rules)
    return here.num_layers * sums + (shape["fsdp"] - 1) * held


def _method(config, model: Model, c: Contender, request, slots, sampling, rule, chip) -> Method:
    whole, buffers = shards.drafter_shapes(c.definition, model.params)
    tree = c.trees[0]
    decoding = decode(model, tree, request, slots, sampling, rule, c.rules)
    training, state_bytes = None, 0
    if c.train is not None:
        training, state_bytes = _training(config, model, c, whole, chip)
    sends = _forward_sends(model, request.batch * tree.nodes)
    stored = shards.whole_bytes(whole) + shards.whole_bytes(buffers)
    held = shards.device_bytes(model.mesh, whole, c.rules) + shards.whole_bytes(buffers)
    return Method(
        name=c.name, parameters=shards.count(whole),
        initial=held if training else 0,
        weights=held,
        training=training, decoding=decoding,
        round=roofline(chip, decoding.round, link_bytes=sends), nodes=tree.nodes,
        stored=stored, checkpoints=CHECKPOINTS * state_bytes,
    )  # fmt: skip


def _training(config, model: Model, c: Contender, whole, chip) -> tuple[Training, int]:
    """(training, bytes of its state on disk)."""
    cfg, mesh = c.train, model.mesh
    first, second, gradients = training_step(model, c.definition, cfg, config.data.length, c.rules)
    objective = make_objective(cfg.loss, cfg.steps, cfg.remat)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps, objective.deepkd)
    state = state_shapes(whole, optimizer)
    weights = shards.device_bytes(mesh, whole, c.rules)
    peak = max(first.peak, gradients + second.peak)
    alive = first.alive if first.peak >= gradients + second.peak else second.alive
    rows = shards.batch_share(mesh, cfg.batch_size) * config.data.length
    sends = _forward_sends(model, rows) + all_reduce(gradients, mesh.shape["data"])
    if mesh.shape["fsdp"] > 1:  # its weights are gathered forward, their gradients summed apart
        sends += 2 * (mesh.shape["fsdp"] - 1) * gradients
    training = Training(
        weights=weights,
        optimizer=shards.device_bytes(mesh, state, c.rules) - weights,
        gradients=gradients,
        temporaries=max(peak - gradients, 0),
        alive=alive,
        tokens=cfg.batch_size * config.data.length,
        steps=cfg.steps,
        step=roofline(chip, first, second, link_bytes=sends),
    )
    return training, sum(map(shards.nbytes, jax.tree.leaves(state)))
