"""Train every drafter of a config for one target, decode with all of them, write the run folder."""

import dataclasses
import functools
import itertools
import os
import pathlib
import platform
import time

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.commands import refusals
from experiments.preflight import check_config, check_methods, check_prompts
from experiments.training_data import (
    batches,
    documents,
    frequent_tokens,
    protocol,
    train_config,
    training_data,
)
from specjax import sharding
from specjax.data.prompts import load_prompts
from specjax.drafters.rasd import fused
from specjax.evaluation.benchmark import (
    Method,
    Shapes,
    benchmark,
    prompt_ids,
    shaded_pieces,
    shared_shapes,
)
from specjax.evaluation.best_paths import best_paths
from specjax.evaluation.calibrate import calibrate
from specjax.evaluation.measured import forget, measured, norms
from specjax.evaluation.records import MethodRun
from specjax.evaluation.report import report_run
from specjax.evaluation.results import result_row, write_results
from specjax.evaluation.run_folder import write_samples
from specjax.evaluation.spec_bench import answers_name, write_answers
from specjax.evaluation.tables import print_table
from specjax.models.target import Target, load_target
from specjax.preemption import stop_if_due
from specjax.processes import is_first, together
from specjax.progress import duration, say
from specjax.trained import init_drafter
from specjax.training.acceptance import fit_acceptance, wants_acceptance_head
from specjax.training.drafter import TauProbe, TrainingCost, train_drafter
from specjax.training.metrics import MetricsLog


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What all drafters of one run share."""

    config: ConfigDict
    folder: pathlib.Path
    target: Target
    mesh: Mesh
    metrics: MetricsLog
    train_prompts: list[list[int]]
    train_rows: dict[str, np.ndarray]
    tasks: dict[str, list]  # task -> prompts
    shapes: dict[str, Shapes]


@refusals()
def prepare(config: ConfigDict, folder) -> Bench:
    """Loads the target, makes the training data and reads the prompts.

    Raises:
      Refused: the config asks for what cannot be, training and decoding included.
    """
    check_config(config)
    metrics = together(lambda: MetricsLog(folder / "metrics.jsonl", config.tensorboard))
    mesh = sharding.make_mesh(config.mesh)
    limit = config.eval.prompts or None
    if config.train.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(
            f"train.batch_size: {config.train.batch_size} rows do not divide over the mesh's data "
            f"x fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']} devices"
        )
    tasks = {
        task: together(functools.partial(load_prompts, task, limit, config.data.data_dir or None))
        for task in config.eval.tasks
    }
    target = together(
        lambda: load_target(
            config.target.name,
            config.target.dtype,
            mesh if mesh.size > 1 else None,
            config.target.scan_layers,
            config.sharding_rules,
        )
    )
    check_prompts(config, target, tasks)
    prompts, rows = training_data(config, target, folder)
    variants = [
        Method(name, drafter.with_budget(**any_paths(budget)))
        for name, drafter in init_all(config, target, rows, config.seed).items()
        for budget in budgets_of(config.drafters[name])
    ]
    check_methods(config, target, variants)
    shapes = {
        task: shared_shapes(target, variants, prompts, protocol(config, task, 0.0))
        for task, prompts in tasks.items()
    }
    drafters = {m.name: m.drafter.params for m in variants}
    sharding.check_rules([target.params, drafters], config.sharding_rules)
    return Bench(config, folder, target, mesh, metrics, prompts, rows, tasks, shapes)


def probe_of(bench: Bench, prompts: list[list[int]], max_new_tokens: int) -> TauProbe:
    """Measures tau with the programs that the benchmark runs on its first task."""
    shapes = next(iter(bench.shapes.values()))
    return TauProbe(prompts, max_new_tokens, shapes.slots, shapes.length)


# ---- train ---------------------------------------------------------------------------------------


def drafter_rules(config, definition) -> sharding.Rules:
    """How a drafter's parameters and their optimiser state lie on the mesh, by the config."""
    return sharding.drafter_rules(
        definition.partition, config.sharding_rules, config.drafter_sharding
    )


def init_of(cfg: ConfigDict) -> dict:
    """A drafter's own fields; `folder`, of a ready model, is among them where one is given."""
    return {k: v for k, v in cfg.init.to_dict().items() if (k, v) != ("folder", "")}


def is_ready(cfg: ConfigDict) -> bool:
    """Whether a drafter's weights come from a folder and stay as they are.

    Steps of its own (`train.steps`) ask for training all the same.
    """
    return "folder" in init_of(cfg) and "steps" not in cfg.train


def init_all(config, target, rows, seed: int) -> dict:
    """Name -> drafter as it is before training."""
    drafters = {}
    for name, cfg in config.drafters.items():
        init = init_of(cfg)
        size = (init | init.get("inner_options", {})).get("draft_vocab_size", 0)
        ids = frequent_tokens(rows, size) if size else None
        drafters[name] = init_drafter(cfg.drafter, target, seed, vocab_ids=ids, **init)
        if cfg.corpus:  # but for the prompts that calibration decodes
            corpus = documents(rows)[config.calibrate.prompts :]
            drafters[name] = fused(drafters[name], corpus)
        if target.mesh is not None:
            rules = drafter_rules(config, drafters[name].definition)
            drafters[name] = drafters[name].on(target.mesh, rules)
    return drafters


def budgets_of(cfg: ConfigDict) -> list[dict]:
    """Every tree a drafter may be run with, the shared one first.

    A budget is fields of the drafter; `best_nodes` asks for the rank paths that pay best with so
    many rows, which are known after training only.
    """
    return [cfg.tree.to_dict(), *(dict(b) for b in cfg.budgets)]


def any_paths(budget: dict) -> dict:
    """The budget with some paths of the size that `best_nodes` asks for, to size caches by."""
    if "best_nodes" not in budget:
        return budget
    every = (path for depth in (1, 2, 3) for path in itertools.product(range(8), repeat=depth))
    paths = itertools.islice(every, budget["best_nodes"] - 1)
    return without_paths(budget) | {"paths": tuple(paths)}


def without_paths(budget: dict) -> dict:
    """The budget as far as it is known before training."""
    return {k: v for k, v in budget.items() if k != "best_nodes"}


def with_best_paths(bench: "Bench", drafter, budget: dict) -> dict:
    """The budget with the paths that `best_nodes` asks for, counted on training text."""
    if "best_nodes" not in budget:
        return budget
    rows = {k: v[:64] for k, v in bench.train_rows.items()}
    paths, tau = best_paths(bench.target, drafter, rows, budget["best_nodes"])
    say(f"{drafter.name}: best tree of {budget['best_nodes']} rows, tau {tau:.2f} on training text")
    return without_paths(budget) | {"paths": paths}


def train_all(bench: Bench, seed: int, names=None, within: str = "") -> list[Method]:
    """Trains (or resumes) each drafter, saves it and returns it at the shared tree.

    Those that are not trained cost nothing.

    Args:
      seed: of initial weights, order of data, and gates that sample.
      names: of the drafters to train, None = all.
      within: folder, inside the run's, of checkpoints and drafters of this seed.
    """
    config, target, methods = bench.config, bench.target, []
    task, prompts = next(iter(bench.tasks.items()))
    settings = protocol(config, task, 0.0)
    ids = [prompt_ids(target, p, [], settings) for p in prompts[: config.train.tau_prompts]]
    probe = probe_of(bench, ids, config.train.tau_new_tokens)
    for name, drafter in init_all(config, target, bench.train_rows, seed).items():
        if names is not None and name not in names:
            continue
        say(
            f"{name}: {drafter.num_params / 1e6:.2f}M parameters, "
            f"target {target.num_params / 1e6:.2f}M"
        )
        tree, cost = config.drafters[name].tree.to_dict(), TrainingCost(0, 0.0)
        if drafter.definition.trained:
            cfg = train_config(config, name)
            stops = wants_acceptance_head(drafter)  # fitted on whole batches in every process
            rows = batches(bench, name, cfg, seed, within, drafter.definition.taps, stops)
            if not is_ready(config.drafters[name]):
                drafter, cost = train_drafter(
                    target, drafter, cfg, rows, without_paths(tree), probe, bench.folder,
                    bench.metrics, "/".join(filter(None, (name, within))), bench.mesh, seed,
                    drafter_rules(config, drafter.definition),
                )  # fmt: skip
            if stops:
                drafter, _ = fit_acceptance(target, drafter, rows, cfg.acceptance_steps, seed=seed)
        drafter = drafter.with_budget(**with_best_paths(bench, drafter, tree))
        together(functools.partial(drafter.save, bench.folder / "drafters" / within / name))
        methods.append(Method(name, drafter, cost, config.eval.rule or None))
        stop_if_due(f"{name} is trained and saved")
    return methods


def calibrated(bench: Bench, methods) -> tuple[list[Method], list[str]]:
    """Each method again, at the tree that calibration found fastest, and what was measured."""
    cfg, best, notes = bench.config.calibrate, [], []
    probe = probe_of(bench, bench.train_prompts[: cfg.prompts], cfg.max_new_tokens)
    for method in methods:
        budgets = [
            with_best_paths(bench, method.drafter, budget)
            for budget in budgets_of(bench.config.drafters[method.name])
        ]
        trial = functools.partial(fastest_of, bench.target, method, budgets, probe)
        depends = circumstances(bench, [method], (budgets, probe))
        fastest, note = measured(bench.folder, f"calibration of {method.name}", depends, trial)
        notes.append(note)
        drafter = method.drafter.with_budget(**budgets[fastest])
        best.append(dataclasses.replace(method, name=f"{method.name}/best", drafter=drafter))
        stop_if_due("drafters are trained, and calibrated so far")
    return best, notes


def fastest_of(target: Target, method: Method, budgets, probe) -> tuple[int, str]:
    """(which of the budgets is fastest, what was measured in words)."""
    trials = calibrate(target, method.drafter, budgets, probe, method.name)
    lines = [f"{t.budget} -> {t.nodes} rows, tau {t.tau:.2f}, {t.round_ms:.2f} ms" for t in trials]
    note = f"Calibration of {method.name} on training prompts, fastest first: " + "; ".join(lines)
    return budgets.index(trials[0].budget), note


def circumstances(bench: Bench, methods, settings) -> dict:
    """What a measurement of these methods depends on; `settings` are told apart by their repr."""
    contenders = {
        m.name: [repr(m.drafter.definition), norms(m.drafter.params), m.rule] for m in methods
    }
    return {
        "device": device_name(),
        "versions": versions(),
        "target": bench.target.fingerprint,
        "contenders": contenders,
        "settings": repr(settings),
    }


# ---- decode --------------------------------------------------------------------------------------


def decode_all(bench: Bench, methods, seed: int, within: str = "") -> tuple[list[dict], list[dict]]:
    """(result rows, one sample answer a method) of every task at every temperature."""
    config, target, results, samples, answers = bench.config, bench.target, [], {}, {}
    for task, prompts in bench.tasks.items():
        for temperature in config.eval.temperatures:
            stop_if_due("drafters are trained and saved, what was decoded is kept")
            settings = dataclasses.replace(protocol(config, task, temperature), seed=seed)
            decode = functools.partial(
                benchmark, target, methods, prompts, settings, config.eval.timing_repeats,
                bench.shapes[task],
            )  # fmt: skip
            kept = measured(
                bench.folder,
                "/".join(filter(None, (within, f"{task} T={temperature:g}"))),
                circumstances(bench, methods, decode.args[2:]),
                lambda decode=decode: [run.to_json() for run in decode()],
            )
            runs = [MethodRun.from_json(fields) for fields in kept]
            vanilla = next(run for run in runs if run.is_vanilla)
            for run in runs:
                results.append(
                    result_row(run, vanilla, vanilla.round_ms, config.eval.bootstrap, seed)
                )
                name = answers_name(run.method, temperature)
                model_id = f"specjax-{name.removesuffix('.jsonl')}"
                answers.setdefault(name, []).append(run)  # the file grows by a task at a time
                path = bench.folder / "answers" / within / name
                together(functools.partial(write_answers, path, answers[name], model_id))
                if not run.is_vanilla and temperature == 0:
                    samples.setdefault(run.method, sample(target, run, prompts))
    return results, list(samples.values())


def sample(target: Target, run, prompts) -> dict:
    """The first answer of a run, token by token with its draft depth, for the report."""
    turn = run.turns[0]
    prompt = next(p for p in prompts if p.question_id == turn.question_id)
    return {
        "method": run.method,
        "prompt": prompt.turns[0][-400:],
        "pieces": shaded_pieces(target, turn),
    }


# ---- report --------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What the run depended on."""
    import flax
    import optax
    import orbax.checkpoint

    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "orbax": orbax.checkpoint.__version__,
        "numpy": np.__version__,
    }


def device_name() -> str:
    """The machine class that numbers were measured on."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    where = f"{device.platform}, {platform.machine()}{cores}"
    return f"{jax.device_count()} x {device.device_kind} ({where})"


def write_up(bench: Bench, results, samples, notes, started: float) -> dict:
    """Writes results.json, samples.json and from the folder report.html, prints the table; returns
    what results.json holds."""
    config, target, folder = bench.config, bench.target, bench.folder
    header = {
        "target": {
            "name": target.name,
            "parameters": target.num_params,
            "layers": target.config.num_layers,
            "hidden_size": target.config.hidden_size,
            "vocab_size": target.config.vocab_size,
        },
        "device": device_name(),
        "dtype": config.target.dtype,
        "versions": versions(),
        "seed": config.seed,
        "preset": config.preset,
    }
    if not is_first():
        return header | {"rows": results}
    write_results(folder / "results.json", header, results)
    write_samples(folder / "samples.json", samples, notes)
    report_run(folder)
    forget(folder)
    for note in notes:
        say(note)
    print_table(results)
    say(
        f"{folder / 'report.html'} and results.json written; "
        f"{duration(time.perf_counter() - started)} in all"
    )
    return header | {"rows": results}


def compare(config: ConfigDict, folder) -> dict:
    """The whole experiment; returns what results.json holds."""
    started = time.perf_counter()
    bench = prepare(config, folder)
    methods = train_all(bench, config.seed)
    best, notes = calibrated(bench, methods) if config.calibrate.prompts else ([], [])
    results, samples = decode_all(bench, [*methods, *best], config.seed)
    return write_up(bench, results, samples, notes, started)
