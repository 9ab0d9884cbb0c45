"""What the drafters of a run train on, as its config says: who asks, who answers, in which rows."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from specjax import processes, sharding
from specjax.data.conversations import read_conversations
from specjax.data.dialogues import contexts_of, given_dialogues, regenerated_dialogues
from specjax.data.feature_cache import FeatureCache, with_features
from specjax.data.prompts import Prompt, load_prompts
from specjax.data.regenerate import regenerate
from specjax.data.rows import Rows, pack_rows, pad_marked, pad_rows
from specjax.evaluation.benchmark import Protocol, cut_left, prompt_ids
from specjax.models.target import Target
from specjax.progress import say
from specjax.sampling import Sampling
from specjax.training.sources import SOURCES, OwnRows, Writing


def protocol(config: ConfigDict, task: str, temperature: float) -> Protocol:
    """The evaluation settings of one task at one temperature."""
    cfg = config.eval
    return Protocol(
        task=task,
        sampling=Sampling(temperature, cfg.top_k, cfg.top_p),
        max_new_tokens=cfg.max_new_tokens,
        repeats=cfg.repeats,
        seed=config.seed,
        batch=cfg.batch,
        max_prompt_tokens=cfg.max_prompt_tokens,
        chat_template=cfg.chat_template.name if cfg.chat_template.use else None,
    )


def train_config(config: ConfigDict, name: str) -> ConfigDict:
    """`config.train` with what this drafter's own `train` changes."""
    cfg = config.train.copy_and_resolve_references()
    with cfg.unlocked():
        cfg.update(config.drafters[name].train)
    return cfg


def prompts_of(config: ConfigDict) -> list[Prompt]:
    """`data.prompts`; what one process cannot read is an error in all."""
    cfg = config.data
    return processes.together(
        lambda: load_prompts(cfg.prompts, limit=cfg.count, data_dir=cfg.data_dir or None)
    )


def training_prompts(config: ConfigDict, target: Target) -> list[list[int]]:
    """Token ids of the training prompts, cut from the left."""
    cfg = config.data
    prompts = prompts_of(config)
    settings = dataclasses.replace(
        protocol(config, "train", 0.0), max_prompt_tokens=cfg.max_prompt_tokens
    )
    return [prompt_ids(target, p, [], settings) for p in prompts]


def training_rows(config: ConfigDict, target: Target, ids, folder) -> dict[str, np.ndarray]:
    """Padded training rows: the prompts continued by the target."""
    cfg = config.data
    sequences = regenerate(
        target, ids, cfg.max_new_tokens, cfg.temperature, config.seed, cfg.batch, folder / "data"
    )
    return pad_rows(sequences, cfg.length, cfg.supervise_prompt)


def dialogues(config: ConfigDict, target: Target, folder=None) -> list:
    """`data.conversations` with their answers marked, which the target writes if `folder` is given.

    Returns:
      (token ids, which of them are trained on) pairs.
    """
    cfg, template = config.data, config.eval.chat_template.name or None
    found, skipped = processes.together(
        lambda: read_conversations(
            cfg.conversations, cfg.count, cfg.skip_damaged, cfg.data_dir or None
        )
    )
    if skipped:
        say(f"data: {len(skipped)} damaged rows skipped, the first: {skipped[0]}")
    if folder is None:
        return given_dialogues(target, found, template)
    return regenerated_dialogues(
        target, found, template, cfg.max_prompt_tokens, cfg.max_new_tokens, cfg.temperature,
        config.seed, cfg.batch, folder / "data",
    )  # fmt: skip


def training_data(config: ConfigDict, target: Target, folder):
    """(prompts, padded training rows that continue them) of what `config.data` names."""
    cfg = config.data
    if not cfg.conversations:
        prompts = training_prompts(config, target)
        return prompts, training_rows(config, target, prompts, folder)
    marked = dialogues(config, target, folder if cfg.regenerate else None)
    bos = target.config.bos_token_id
    prompts = [cut_left(ids, cfg.max_prompt_tokens, bos) for ids in contexts_of(marked)]
    return prompts, pad_marked(marked, cfg.length)


def text_rows(config: ConfigDict, target: Target, ids) -> dict[str, np.ndarray]:
    """Padded training rows: the prompts with the answers that people gave, where there are any."""
    cfg, sequences = config.data, []
    if cfg.conversations:
        return pad_marked(dialogues(config, target), cfg.length)
    joint = "" if config.eval.chat_template.use else "\n"
    prompts = prompts_of(config)
    for prompt, row in zip(prompts, ids, strict=True):
        answer = joint + prompt.reference if prompt.reference else ""
        new = target.tokenizer(answer, add_special_tokens=False)["input_ids"]
        sequences.append((row + new[: cfg.max_new_tokens], len(row)))
    return pad_rows(sequences, cfg.length, cfg.supervise_prompt)


def batches(bench, name: str, cfg: ConfigDict, seed: int, within: str, taps=(), whole=False):
    """(step, drafter) -> the training batch, written by whom `cfg.source` says.

    `bench` is what the drafters of a run share (`compare.Bench`).
    Each process has its part of a batch, or `whole` ones. `taps` are those of the drafter, whose
    features are cached if `cfg.cache_features` says so.

    Raises:
      ValueError: an unknown source, or one that another field rules out.
    """
    config, target = bench.config, bench.target
    if cfg.source not in SOURCES:
        raise ValueError(f"train.source: {cfg.source!r} is unknown; one of {SOURCES}")
    rows = bench.train_rows
    if cfg.source == "text":
        rows = text_rows(config, target, bench.train_prompts)
    written = cfg.source not in ("target", "text")
    for field, value in (
        ("data.packing", config.data.packing), ("train.cache_features", cfg.cache_features),
    ):  # fmt: skip
        if written and value:
            raise ValueError(f"{field}: rows of train.source {cfg.source!r} change in training")
    if config.data.packing:
        rows = pack_rows(rows)
    share = sharding.process_share(bench.mesh, cfg.batch_size)
    stream = Rows(rows, cfg.batch_size, seed, *((0, 1) if written or whole else share))
    if cfg.cache_features:
        cache = processes.together(
            lambda: FeatureCache(cfg.cache_features, target, taps, rows, cfg.batch_size)
        )
        return with_features(stream, cache)
    if not written:
        return stream.batch
    if cfg.loss.gate == "adaspec":
        raise ValueError(
            f"train.source: {cfg.source!r} is text of one drafter; gate 'adaspec' trains two"
        )
    how = Writing(
        share=cfg.own_share if cfg.source == "mix" else 1.0,
        refresh=cfg.refresh,
        temperature=cfg.own_temperature,
        max_new_tokens=config.data.max_new_tokens,
        batch=config.data.batch,
    )
    folder = bench.folder / "data" / "own" / within / name
    supervise = config.data.supervise_prompt
    return OwnRows(stream, bench.train_prompts, target, how, supervise, folder).batch


def frequent_tokens(rows, size: int) -> np.ndarray:
    """The `size` most frequent supervised token ids of the training rows."""
    counts = np.bincount(rows["tokens"][rows["supervised"]])
    counts = np.pad(counts, (0, max(0, size - len(counts))))
    return np.sort(np.argsort(-counts, kind="stable")[:size])


def documents(rows) -> list[np.ndarray]:
    """The training rows without their padding: what a retrieval drafter may look in."""
    ends = [int(mask.nonzero()[0].max(initial=-1)) + 1 for mask in rows["supervised"]]
    return [tokens[:end] for tokens, end in zip(rows["tokens"], ends, strict=True)]
