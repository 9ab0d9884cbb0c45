"""Trains one drafter for one target, with decode-time tau on the way."""

import dataclasses
import functools
import json
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from specjax import decoding, sharding
from specjax.distillation.deepkd import stream_gradients
from specjax.distillation.gsnr import probed_gsnr
from specjax.drafters.base import join_buffers, split_buffers
from specjax.generation import collect, make_engine, start
from specjax.models.target import Target
from specjax.planning.accelerators import peak_of
from specjax.trained import TrainedDrafter
from specjax.training.checkpoints import Checkpoints
from specjax.training.loop import fit
from specjax.training.metrics import MetricsLog
from specjax.training.model_flops import model_flops
from specjax.training.objective import Objective, drafter_loss, make_objective
from specjax.training.optimizers import make_optimizer
from specjax.training.state import create, make_step, one_gradient


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """What a drafter's training took, a reference drafter's included.

    Seconds are those of its steps, over all processes that it took.
    """

    tokens: int
    seconds: float
    step_flops: float = 0.0  # of one step, by XLA's count of the traced program


@dataclasses.dataclass(frozen=True)
class TauProbe:
    """Decode-time tau: greedy decoding of a few prompts, one by one, as the benchmark does it.

    With the benchmark's tree, `slots` and padded prompt `length` it shares its compiled programs.
    """

    prompts: list[list[int]]  # token ids
    max_new_tokens: int
    slots: int = 0
    length: int = 0

    def start(self, engine, params, index: int):
        """The state before the first round on one of the prompts."""
        return start(
            engine, params, [self.prompts[index]], self.max_new_tokens,
            slots=self.slots, length=self.length,
        )  # fmt: skip

    def __call__(self, target: Target, drafter: TrainedDrafter) -> float | None:
        """Tokens per round, prefill left out; None if every answer ends there."""
        engine, params = make_engine(target, drafter)
        rounds = []
        for index in range(len(self.prompts)):
            state = self.start(engine, params, index)
            _, accepts = collect(decoding.run_host(engine, params, state))
            rounds += accepts[0][1:]
        return float(np.mean(rounds)) if rounds else None


def train_drafter(
    target: Target,
    drafter: TrainedDrafter,
    cfg: ConfigDict,
    batch_fn,
    tree: dict,
    probe: TauProbe,
    folder,
    metrics: MetricsLog,
    label: str,
    mesh,
    seed: int = 0,
    rules=None,
) -> tuple[TrainedDrafter, TrainingCost]:
    """Trains (or resumes) and returns the drafter with what it cost.

    Args:
      cfg: steps, batch_size, optimizer, loss, logging and checkpoint intervals.
      batch_fn: (step, the drafter by then, None for any) -> this process's rows of the batch, or
        all of them in every process; host arrays as `drafter_loss` takes them.
      tree: fields of the drafter that shape the tree it is probed with.
      probe: measures decode-time tau on held-out prompts every `cfg.tau_every` steps.
      folder: the run folder.
      label: name in metrics and checkpoints.
      mesh: parameters and batches are sharded over it.
      seed: of gates that sample.
      rules: of the drafter's parameters and optimiser state; None = its own and the models'.
    """
    cost, reference, buffers = TrainingCost(0, 0.0), None, split_buffers(drafter.params)[1]
    if needs_reference(cfg):
        reference, cost = train_drafter(
            target, drafter, reference_config(cfg), batch_fn, tree, probe, folder, metrics,
            f"{label}-reference", mesh, seed, rules,
        )  # fmt: skip
    step, state, frozen = set_up(target, drafter, cfg, mesh, seed, reference, rules)

    def with_params(params):
        return dataclasses.replace(drafter, params=join_buffers(params, buffers))

    def place(step, state):
        rows = batch_fn(step, state and with_params(state.params))
        return place_rows(mesh, cfg.batch_size, rows)

    def evaluate(state):
        # The state is donated to the next step: decode with a copy of its parameters, on one
        # device as if there were no mesh (the same compiled programs).
        own = lambda w: w.copy() if mesh.size > 1 else jax.device_put(w.copy())  # noqa: E731
        params = jax.tree.map(own, state.params)
        return {"tau": probe(target, with_params(params).with_budget(**tree))}

    first = place(0, None)
    tokens_per_step = first["tokens"].size
    checkpoints = Checkpoints(folder / "checkpoints" / label.replace("/", "-"))
    traced = (step.lower(state, frozen, first).cost_analysis() or {}).get("flops", 0.0)
    objective = make_objective(cfg.loss, cfg.steps, cfg.remat)
    flops = model_flops(drafter.definition, objective, state.params, frozen, first)
    state = fit(
        f"train/{label}", state, frozen, step, place, cfg.steps,
        checkpoints=checkpoints, checkpoint_every=cfg.checkpoint_every, metrics=metrics,
        log_every=cfg.log_every, evaluate=evaluate if cfg.tau_every else None,
        evaluate_every=cfg.tau_every, tokens_per_step=tokens_per_step, flops_per_step=flops,
        peak_flops=peak_of(mesh.devices.flat, target.params["embed"].dtype),
    )  # fmt: skip
    checkpoints.close()
    if ratios := probed_gsnr(state.opt_state):
        metrics.write(f"train/{label}", cfg.steps, **ratios)
    seconds = metrics.seconds(f"train/{label}", tokens_per_step)
    cost = TrainingCost(cost.tokens + cfg.steps * tokens_per_step, cost.seconds + seconds, traced)
    return with_params(state.params), cost


def place_rows(mesh, count: int, rows):
    """A batch of `count` rows on its mesh; a process hands in its own, or all and keeps its own."""
    layout = sharding.batch_sharding(mesh)

    def whole(array):
        return jax.make_array_from_process_local_data(layout, array, (count, *array.shape[1:]))

    return jax.tree.map(whole, rows)


def set_up(target, drafter, cfg, mesh, seed=0, reference: TrainedDrafter | None = None, rules=None):
    """(compiled step, state before the first one, what it reads besides) on their mesh."""
    rules = sharding.drafter_rules(drafter.definition.partition) if rules is None else rules
    trainable, buffers = split_buffers(drafter.params)
    step, optimizer = step_of(drafter.definition, cfg, mesh)
    state = create(trainable, optimizer)
    frozen = {"key": jax.random.key(seed), "target": target.params, "buffers": buffers}
    if reference is not None:
        frozen["reference"] = split_buffers(reference.params)[0]
    places = layout(mesh, state, frozen, rules)
    if target.mesh is not None:
        places[1]["target"] = jax.tree.map(lambda w: w.sharding, target.params)
    return step, *sharding.place((state, frozen), places)


def step_of(definition, cfg, mesh):
    """(the step of `config.train` as it runs on a mesh, its optimiser)."""
    objective = make_objective(cfg.loss, cfg.steps, cfg.remat)
    step, optimizer = compiled_step(definition, objective, cfg.optimizer.to_json(), cfg.steps)
    return (OnMesh(step, mesh) if mesh.size > 1 else step), optimizer


def layout(mesh, state, frozen, rules, target_rules=sharding.MODEL_RULES):
    """The trees of shardings of what a step carries and reads, arrays or shapes."""
    kinds = {"target": target_rules, "reference": rules}
    places = {
        k: sharding.shardings(mesh, v, kinds.get(k, sharding.REPLICATED)) for k, v in frozen.items()
    }
    return sharding.shardings(mesh, state, rules), places


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A jitted step that is traced and run with its mesh set."""

    step: Callable
    mesh: Mesh

    def __call__(self, *args):
        with jax.set_mesh(self.mesh):
            return self.step(*args)

    def lower(self, *args):
        """As that of the jitted step."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(*args)


@functools.lru_cache(maxsize=32)
def compiled_step(definition, objective: Objective, optimizer_json: str, steps: int):
    """(jitted step, optimiser): one compilation for all seeds of one recipe."""
    cfg = ConfigDict(json.loads(optimizer_json))
    optimizer = make_optimizer(cfg, steps, objective.deepkd)

    def loss_fn(params, frozen, batch, step):
        key = jax.random.fold_in(frozen["key"], step)
        return drafter_loss(definition, objective, params, frozen, batch, step, key)

    differentiate = stream_gradients if objective.deepkd else one_gradient
    return make_step(loss_fn, optimizer, differentiate), optimizer


def needs_reference(cfg: ConfigDict) -> bool:
    """Whether the gate compares with a reference drafter, trained first."""
    return cfg.loss.gate == "adaspec"


def reference_config(cfg: ConfigDict) -> ConfigDict:
    """Training of the reference drafter that AdaSPEC compares with: the same without the gate."""
    cfg = cfg.copy_and_resolve_references()
    steps = cfg.loss.reference_steps or cfg.steps
    with cfg.unlocked():
        cfg.steps, cfg.tau_every = steps, 0
        cfg.loss.gate, cfg.loss.gate_options = "everything", ConfigDict()
    return cfg
