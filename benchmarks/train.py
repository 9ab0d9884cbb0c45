"""python -m benchmarks.train: what a training step takes, against this machine's matrix products.

Times the step of every trained drafter of a recipe at its batch and length, target's forward
included, and the step's parts as calls of their own, all in turns in one process. Beside each stand
the operations of its matrix products (counted in the traced program; what is recomputed counts
once, elementwise work not at all) and the share of `jnp.dot`'s measured throughput that they make.
Input and logging are timed as the training loop calls them.

    python -m benchmarks.train
    python -m benchmarks.train --config=configs/compare.py
    python -m benchmarks.train --geometry=llama31_8b
    python -m benchmarks.train --geometry=llama31_8b --layers=4 --batch=1 --length=64
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from benchmarks import timing
from benchmarks.targets import GEOMETRY_HELP, geometry_target, get_target
from configs import fasteagle
from experiments import commands
from experiments.training_data import train_config
from specjax import sharding
from specjax.console import make_console, print_rows
from specjax.data.rows import Rows
from specjax.drafters.base import join_buffers
from specjax.models.target import Target
from specjax.models.transformer import text_features
from specjax.trained import TrainedDrafter, init_drafter
from specjax.training.drafter import compiled_step, needs_reference, place_rows, set_up
from specjax.training.metrics import MetricsLog
from specjax.training.model_flops import products_of, step_products
from specjax.training.objective import drafter_loss, make_objective

_CONFIG = config_flags.DEFINE_config_file("config", None, "recipe; none: FastEagle's")
_GEOMETRY = flags.DEFINE_string("geometry", None, f"in place of its target: {GEOMETRY_HELP}")
_LAYERS = flags.DEFINE_integer("layers", 0, "with --geometry: target layers, 0 = all of them")
_BATCH = flags.DEFINE_integer("batch", 0, "rows, 0 = the recipe's")
_LENGTH = flags.DEFINE_integer("length", 0, "tokens of a row, 0 = the recipe's")
_REPEATS = flags.DEFINE_integer("repeats", 9, "samples of each call", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "file for the numbers")

Products = dict[str, float]  # precision -> operations


def dots(precisions) -> dict[str, Callable]:
    """A large square product by `jnp.dot` at each precision, and NumPy's on a CPU."""
    calls, size = {}, timing.MATMUL_SIZE
    host = np.random.default_rng(0).standard_normal((size, size), np.float32)
    for precision in precisions:
        matrix = jnp.asarray(host, jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
        how = "highest" if precision == "float32" else "default"
        product = jax.jit(functools.partial(jnp.dot, precision=how))
        calls[f"jnp.dot {precision}"] = functools.partial(product, matrix, matrix)
    if jax.default_backend() == "cpu":
        calls["numpy float32"] = lambda: host @ host
    return calls


def kinds(products: Products) -> Products:
    """Products by the precisions that this backend tells apart: a CPU never rounds float32."""
    if jax.default_backend() != "cpu":
        return products
    merged = dict(products)
    rounded = merged.pop("rounded", 0.0)
    return merged | ({"float32": merged.get("float32", 0.0) + rounded} if rounded else {})


# ---- a step and its parts as calls ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """What is timed, and its matrix products."""

    call: Callable
    products: Products


class StatesGiven:
    """A drafter whose training states are given: what is left of a step is its readout and loss."""

    def __init__(self, definition, states):
        self._definition, self._states = definition, states

    def __getattr__(self, name):
        return getattr(self._definition, name)

    def teach(self, *_):
        return self._states["hidden"], self._states["aligned"]


def read_out(definition, params, target_params, hidden) -> set[str]:
    """Which of the parameters, by their first name, the readout trains."""

    def reading(params, hidden):
        return definition.normed(params, hidden), definition.head(params, target_params)

    jaxpr = jax.make_jaxpr(reading)(params, hidden).jaxpr
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    paths = [keys[0].key for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {name for name, v in zip(paths, jaxpr.invars, strict=False) if id(v) in read}


def training_calls(target: Target, drafter: TrainedDrafter, cfg: ConfigDict, batch, mesh):
    """Name -> call: the whole step, then its parts."""
    step, state, frozen = set_up(target, drafter, cfg, mesh)
    definition, objective = drafter.definition, make_objective(cfg.loss, cfg.steps)
    _, optimizer = compiled_step(definition, objective, cfg.optimizer.to_json(), cfg.steps)
    tokens, buffers = batch["tokens"], frozen["buffers"]

    def features(target_params, tokens):
        return text_features(target_params, target.config, definition.taps, tokens)

    def teach(params, taps):
        return definition.teach(join_buffers(params, buffers), target.params, taps, tokens)

    def teach_back(params, taps, cotangents):
        states, back = jax.vjp(lambda p: teach(p, taps), params)
        return states, back(cotangents)

    def loss(states, readout, others, frozen, batch):
        def value(states, readout):
            stub, params = StatesGiven(definition, states), readout | others
            return drafter_loss(stub, objective, params, frozen, batch, 0, frozen["key"])[0].sum()

        return jax.value_and_grad(value, argnums=(0, 1))(states, readout)

    def update(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    made = jax.jit(features)(target.params, tokens)
    trained = jax.tree.map(jnp.copy, state.params)
    taps = made.get("taps")
    hidden, aligned = jax.jit(teach)(trained, taps)
    states, given = {"hidden": hidden, "aligned": aligned}, batch | {"features": made}
    names = read_out(definition, trained, target.params, hidden[0])
    readout = {name: w for name, w in trained.items() if name in names}
    others = {name: w for name, w in trained.items() if name not in names}
    if objective.streams > 1:  # DeepKD's gradients are one for each stream
        grow = lambda w: jnp.zeros((objective.streams, *w.shape))  # noqa: E731
        grads = jax.tree.map(grow, trained)
    else:
        grads = jax.tree.map(jnp.ones_like, trained)
    # A compiled update may take the place of what it is given, as it does inside of a step.
    updating = [jax.tree.map(jnp.copy, x) for x in (trained, state.opt_state)]
    jit_update = jax.jit(update, donate_argnums=(0, 1))

    def whole():
        nonlocal state
        state, values = step(state, frozen, batch)
        return values

    def updated():
        updating[:] = jit_update(*updating, grads)
        return updating[0]

    def part(fn, *args):
        return Call(functools.partial(jax.jit(fn), *args), products_of(fn, *args))

    gradient = step_products(definition, objective, trained, frozen, batch)
    steering = products_of(update, trained, state.opt_state, grads)
    both = {k: gradient.get(k, 0.0) + steering.get(k, 0.0) for k in gradient | steering}
    return {
        "step": Call(whole, both),
        "target forward": part(features, target.params, tokens),
        "drafter forward": part(teach, trained, taps),
        "drafter forward and backward": part(teach_back, trained, taps, (hidden, aligned)),
        "logits and loss, forward and backward": part(loss, states, readout, others, frozen, given),
        "optimiser": Call(updated, steering),
    }


# ---- what is measured ----------------------------------------------------------------------------


def contenders(config: ConfigDict, target: Target) -> dict[str, TrainedDrafter]:
    """The trained drafters of a recipe, fresh; a draft vocabulary is any tokens."""
    made = {}
    for name, cfg in config.drafters.items():
        init = cfg.init.to_dict()
        size = init.get("draft_vocab_size", 0)
        drafter = init_drafter(
            cfg.drafter, target, vocab_ids=np.arange(size) if size else None, **init
        )
        if drafter.definition.trained and not needs_reference(train_config(config, name)):
            made[name] = drafter
    return made


def rows_of(config: ConfigDict, vocab_size: int) -> dict[str, np.ndarray]:
    """As many made-up rows as the recipe trains on; only their shape matters here."""
    shape = max(config.data.count, config.train.batch_size), config.data.length
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)
    return {"tokens": tokens, "supervised": np.ones(shape, bool)}


def host_calls(stream: Rows, mesh, cfg: ConfigDict, folder) -> dict[str, Callable]:
    """What the loop does on the host: a batch every step, a row of metrics every `log_every`."""
    log, step = MetricsLog(pathlib.Path(folder) / "metrics.jsonl"), iter(range(10**9))
    values = {f"ce_{i}": 1.0 for i in range(1, 8)} | {"loss": 1.0, "grad_norm": 1.0}
    return {
        "input": lambda: place_rows(mesh, cfg.batch_size, stream.batch(next(step))),
        "logging": lambda: log.write("train/drafter", next(step), **values),
    }


def measure(config: ConfigDict, target: Target, repeats: int) -> dict:
    """Runs everything; returns what the tables show, for machines."""
    mesh = sharding.make_mesh((-1, 1, 1), jax.devices()[:1])
    stream = Rows(rows_of(config, target.config.vocab_size), config.train.batch_size, 0)
    batch = place_rows(mesh, config.train.batch_size, stream.batch(0))
    calls: dict[str, Call] = {}
    for name, drafter in contenders(config, target).items():
        found = training_calls(target, drafter, train_config(config, name), batch, mesh)
        calls |= {f"{name}: {part}": call for part, call in found.items()}
    if not calls:
        raise ValueError(f"config: {config.name!r} trains no drafter that can be timed alone")
    products = dots(sorted({p for call in calls.values() for p in kinds(call.products)}))
    with tempfile.TemporaryDirectory() as folder:
        timings = timing.interleaved(
            products
            | {name: call.call for name, call in calls.items()}
            | host_calls(stream, mesh, config.train, folder),
            repeats,
        )
    operations = 2.0 * timing.MATMUL_SIZE**3
    rates = {
        name: 1e3 * operations / t.ms
        for name, t in timings.items()
        if name.startswith(("jnp", "nu"))
    }
    rows = []
    for name, call in calls.items():
        work = kinds(call.products)
        # Ideal over actual time in the same turn, so that noise hits both alike.
        ideal = sum(
            n / operations * np.array(timings[f"jnp.dot {p}"].seconds) for p, n in work.items()
        )
        share = ideal / np.array(timings[name].seconds)
        label = name.split(": ")[0]
        of_step = timing.ratio(timings[name], timings[f"{label}: step"])[0]
        rows.append(
            {
                "what": name, "ms": timings[name].ms, "quartiles_ms": timings[name].quartiles_ms,
                "flops": sum(work.values()), "share_of_dot": float(np.median(share)),
                "share_of_step": of_step,
            }
        )  # fmt: skip
    host = []
    for label in dict.fromkeys(name.split(": ")[0] for name in calls):
        step = timings[f"{label}: step"]
        cfg = train_config(config, label)
        host.append(
            {
                "method": label, "input_ms": timings["input"].ms,
                "logging_ms": timings["logging"].ms,
                "share_of_step": timing.ratio(timings["input"], step)[0]
                + timing.ratio(timings["logging"], step)[0] / cfg.log_every,
            }
        )  # fmt: skip
    return {
        "config": config.name, "preset": config.preset, "target": target.name,
        "layers": target.config.num_layers, "parameters": target.num_params,
        "dtype": str(target.params["embed"].dtype), "batch": config.train.batch_size,
        "length": config.data.length, "device": jax.devices()[0].device_kind,
        "cores": timing.cores(), "rates": rates, "rows": rows, "host": host,
    }  # fmt: skip


# ---- printing ------------------------------------------------------------------------------------


def print_report(report: dict, console: Console) -> None:
    """The machine's products, one line a call, what input and logging take."""
    console.print(
        f"{report['config']}:{report['preset']}, {report['target']}: {report['layers']} layers, "
        f"{report['parameters'] / 1e6:.1f}M parameters, {report['dtype']}; {report['batch']} x "
        f"{report['length']} tokens a step; {report['device']}, {report['cores']} cores"
    )
    for name, rate in report["rates"].items():
        console.print(f"  {1e-9 * rate:9.1f} GFLOP/s {name}, square {timing.MATMUL_SIZE}")
    rows = [
        (
            r["what"], f"{r['ms']:.2f}", "{:.2f}-{:.2f}".format(*r["quartiles_ms"]),
            f"{1e-9 * r['flops']:.2f}", f"{1e-6 * r['flops'] / r['ms']:.1f}",
            f"{100 * r['share_of_dot']:.0f}%", f"{100 * r['share_of_step']:.0f}%",
        )
        for r in report["rows"]
    ]  # fmt: skip
    headings = "what | ms | quartiles | GFLOP | GFLOP/s | of jnp.dot | of the step"
    print_rows(console, headings, rows, "Median time of a training step and of its parts")
    rows = [
        (
            h["method"], f"{h['input_ms']:.3f}", f"{h['logging_ms']:.3f}",
            f"{100 * h['share_of_step']:.2f}%",
        )
        for h in report["host"]
    ]  # fmt: skip
    headings = "method | input ms a step | logging ms a row | of the step"
    print_rows(console, headings, rows, "On the host")


def main():
    preset = _GEOMETRY.value or ""
    config = _CONFIG.value or commands.tried("geometry", fasteagle.get_config, preset)
    if "drafters" not in config:
        raise app.UsageError(f"config: {config.name!r} is no recipe of drafters")
    with config.unlocked():
        config.train.batch_size = _BATCH.value or config.train.batch_size
        config.data.length = _LENGTH.value or config.data.length
        if config.train.loss.chunk >= config.data.length:
            config.train.loss.chunk = 0
        # Rows are made up here: enough of them to shuffle, not a corpus.
        config.data.count = min(config.data.count, 1024)
    try:
        if _GEOMETRY.value:
            target = geometry_target(_GEOMETRY.value, _LAYERS.value)
        else:
            target = get_target(config.target.name, config.target.dtype)
        report = measure(config, target, _REPEATS.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    print_report(report, make_console())
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    commands.run(main)
