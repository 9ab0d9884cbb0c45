"""Train every drafter of a config for one target, decode with all of them, write the run folder."""

import dataclasses
import os
import platform
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from specjax.data.prompts import load_prompts
from specjax.data.regenerate import Rows, pad_rows, regenerate
from specjax.evaluation.benchmark import (
    Method,
    Protocol,
    benchmark,
    prompt_ids,
    shaded_pieces,
    shared_shapes,
)
from specjax.evaluation.calibrate import calibrate
from specjax.evaluation.report import write_report
from specjax.evaluation.results import read_results, result_row, write_results
from specjax.evaluation.spec_bench import answers_name, write_answers
from specjax.evaluation.tables import print_table
from specjax.generation import init_drafter
from specjax.models.target import Target, load_target
from specjax.sampling import Sampling
from specjax.training import sharding
from specjax.training.drafter import TauProbe, train_drafter
from specjax.training.metrics import MetricsLog
from specjax.training.progress import duration, say


def protocol(config: ConfigDict, task: str, temperature: float) -> Protocol:
    """The evaluation settings of one task at one temperature."""
    cfg = config.eval
    return Protocol(
        task=task,
        sampling=Sampling(
            temperature, cfg.top_k if temperature else 0, cfg.top_p if temperature else 1.0
        ),
        max_new_tokens=cfg.max_new_tokens,
        repeats=cfg.repeats,
        seed=config.seed,
        batch=cfg.batch,
        max_prompt_tokens=cfg.max_prompt_tokens,
        chat_template=cfg.chat_template.name if cfg.chat_template.use else None,
    )


def training_prompts(config: ConfigDict, target: Target) -> list[list[int]]:
    """Token ids of the training prompts, cut from the left."""
    cfg = config.data
    prompts = load_prompts(cfg.prompts, limit=cfg.count, data_dir=cfg.data_dir or None)
    settings = protocol(config, "train", 0.0)
    ids = [prompt_ids(target, p, [], settings) for p in prompts]
    return [row[:1] + row[1:][-(cfg.max_prompt_tokens - 1) :] for row in ids]


def training_rows(config: ConfigDict, target: Target, prompts, folder) -> dict[str, np.ndarray]:
    """Padded training rows: the prompts continued by the target, or the given text."""
    cfg = config.data
    if cfg.regenerate:
        sequences = regenerate(
            target, prompts, cfg.max_new_tokens, cfg.temperature, config.seed, cfg.batch,
            folder / "data",
        )  # fmt: skip
    else:
        sequences = [(ids, 0) for ids in prompts]
    return pad_rows(sequences, cfg.length, cfg.supervise_prompt)


def frequent_tokens(rows, size: int) -> np.ndarray:
    """The `size` most frequent supervised token ids of the training rows."""
    counts = np.bincount(rows["tokens"][rows["supervised"]])
    counts = np.pad(counts, (0, max(0, size - len(counts))))
    return np.sort(np.argsort(-counts, kind="stable")[:size])


def init_all(config, target, rows) -> dict:
    """Name -> untrained drafter, announced with its size."""
    drafters = {}
    for name, cfg in config.drafters.items():
        init = cfg.init.to_dict()
        size = init.get("draft_vocab_size", 0)
        ids = frequent_tokens(rows, size) if size else None
        drafters[name] = init_drafter(cfg.drafter, target, config.seed, vocab_ids=ids, **init)
        say(
            f"{name}: {drafters[name].num_params / 1e6:.2f}M parameters, "
            f"target {target.num_params / 1e6:.2f}M"
        )
    return drafters


def budgets_of(cfg: ConfigDict) -> list[dict]:
    """Every tree a drafter may be run with, the shared one first."""
    return [cfg.tree.to_dict(), *(dict(b) for b in cfg.budgets)]


def train_all(config, target, drafters, rows, probe, folder, metrics, mesh) -> list[Method]:
    """Trains (or resumes) each drafter, saves it and returns it at the shared tree."""
    methods = []
    for name, drafter in drafters.items():
        tree = config.drafters[name].tree.to_dict()
        stream = Rows(rows, config.train.batch_size, config.seed)
        drafter, cost = train_drafter(
            target, drafter, config.train, stream.batch, tree, probe, folder, metrics, name, mesh
        )
        drafter = drafter.with_budget(**tree)
        drafter.save(folder / "drafters" / name)
        methods.append(Method(name, drafter, cost, config.eval.rule or None))
    return methods


def calibrated(config, target, methods, probe) -> tuple[list[Method], list[str]]:
    """Each method again, at the tree that calibration found fastest, and what was measured."""
    best, notes = [], []
    for method in methods:
        trials = calibrate(
            target, method.drafter, budgets_of(config.drafters[method.name]), probe, method.name
        )
        lines = [
            f"{t.budget} -> {t.nodes} rows, tau {t.tau:.2f}, {t.round_ms:.2f} ms" for t in trials
        ]
        notes.append(
            f"Calibration of {method.name} on training prompts, fastest first: " + "; ".join(lines)
        )
        drafter = method.drafter.with_budget(**trials[0].budget)
        best.append(dataclasses.replace(method, name=f"{method.name}/best", drafter=drafter))
    return best, notes


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


def compare(config: ConfigDict, folder) -> dict:
    """The whole experiment; returns what results.json holds."""
    started = time.perf_counter()
    mesh = sharding.make_mesh(config.mesh)
    sharded = mesh.size > 1
    target = load_target(
        config.target.name,
        config.target.dtype,
        mesh if sharded else None,
        config.target.scan_layers,
    )
    metrics = MetricsLog(folder / "metrics.jsonl")

    # ---- data ----
    prompts = training_prompts(config, target)
    rows = training_rows(config, target, prompts, folder)
    tasks = {
        task: load_prompts(
            task, limit=config.eval.prompts or None, data_dir=config.data.data_dir or None
        )
        for task in config.eval.tasks
    }
    drafters = init_all(config, target, rows)
    variants = [
        Method(name, drafter.with_budget(**budget))
        for name, drafter in drafters.items()
        for budget in budgets_of(config.drafters[name])
    ]
    shapes = {
        task: shared_shapes(target, variants, task_prompts, protocol(config, task, 0.0))
        for task, task_prompts in tasks.items()
    }
    task, task_prompts = next(iter(tasks.items()))
    probe = TauProbe(
        [
            prompt_ids(target, p, [], protocol(config, task, 0.0))
            for p in task_prompts[: config.train.tau_prompts]
        ],
        config.train.tau_new_tokens,
        shapes[task].slots,
        shapes[task].length,
    )

    # ---- train ----
    methods = train_all(config, target, drafters, rows, probe, folder, metrics, mesh)

    # ---- choose trees ----
    probe = dataclasses.replace(
        probe,
        prompts=prompts[: config.calibrate.prompts],
        max_new_tokens=config.calibrate.max_new_tokens,
    )
    best, notes = calibrated(config, target, methods, probe)

    # ---- decode ----
    results, samples = [], []
    for task, task_prompts in tasks.items():
        for temperature in config.eval.temperatures:
            runs = benchmark(
                target, [*methods, *best], task_prompts, protocol(config, task, temperature),
                shapes=shapes[task],
            )  # fmt: skip
            vanilla = next(run for run in runs if run.is_vanilla)
            for run in runs:
                results.append(
                    result_row(run, vanilla, vanilla.round_ms, config.eval.bootstrap, config.seed)
                )
                name = answers_name(run.method, temperature)
                model_id = f"specjax-{name.removesuffix('.jsonl')}"
                parent = folder / "answers" if len(tasks) == 1 else folder / "answers" / task
                write_answers(parent / name, run, model_id)
                if not run.is_vanilla and temperature == 0 and not samples_has(samples, run.method):
                    samples.append(sample(target, run, task_prompts))

    # ---- report ----
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
    write_results(folder / "results.json", header, results)
    write_report(
        folder / "report.html", read_results(folder / "results.json"), metrics.path, samples, notes
    )
    for note in notes:
        say(note)
    print_table(results)
    say(
        f"{folder / 'report.html'} and results.json written; "
        f"{duration(time.perf_counter() - started)} in all"
    )
    return header | {"rows": results}


def samples_has(samples, method: str) -> bool:
    """Whether a method has its sample already."""
    return any(s["method"] == method for s in samples)


def sample(target: Target, run, prompts) -> dict:
    """The first answer of a run, token by token with its draft depth, for the report."""
    turn = run.turns[0]
    prompt = next(p for p in prompts if p.question_id == turn.question_id)
    return {
        "method": run.method,
        "prompt": prompt.turns[0][-400:],
        "pieces": shaded_pieces(target, turn),
    }
