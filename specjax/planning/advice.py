"""Which fields to change when a run does not fit: every change named was tried on paper."""

from collections.abc import Callable, Iterator

from specjax.planning.estimate import Estimate

ROUNDS = 6


def candidates(config, found: Estimate) -> Iterator[dict]:
    """Changes that could shrink the largest stage, as {field: value}, the recipe's own last."""
    data, fsdp, tensor = found.mesh
    if data % 2 == 0:
        yield {"mesh": (data // 2, fsdp, tensor * 2)}
        yield {"mesh": (data // 2, fsdp * 2, tensor)}
    if fsdp % 2 == 0:
        yield {"mesh": (data, fsdp // 2, tensor * 2)}
    if config.target.dtype == "float32":
        yield {"target.dtype": "bfloat16"}
    if found.worst in ("load", "regenerate", "decode"):
        yield {"target.scan_layers": not config.target.scan_layers}
    field = {"regenerate": "data.batch", "decode": "eval.batch"}.get(found.worst)
    if field:
        part, name = field.split(".")
        if config[part][name] > 1:
            yield {field: config[part][name] // 2}
    if found.worst == "train":
        if not config.train.remat:
            yield {"train.remat": True}
        length, chunk = config.data.length, config.train.loss.chunk
        smaller = [s for s in (256, 128, 64) if s < (chunk or length)]
        for value in smaller[:1]:
            yield {"train.loss.chunk": value}
        if config.train.batch_size % 2 == 0:
            yield {"train.batch_size": config.train.batch_size // 2}
        if length % 2 == 0 and length > 256:
            yield {"data.length": length // 2}


def changed(config, changes: dict):
    """A copy of a config with some fields changed."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def advise(
    config, found: Estimate, run: Callable[[object], Estimate]
) -> tuple[dict, Estimate, list[tuple[dict, int]]]:
    """(changes that together make it fit or come nearest, the estimate with them, what each single
    step took off the peak, in bytes).

    One change at a time: the first that makes it fit, else the one after which the peak is lowest.

    Args:
      run: the estimate of another config; ValueError where it cannot be run.
    """
    changes: dict = {}
    steps: list[tuple[dict, int]] = []
    for _ in range(ROUNDS):
        if found.fits:
            break
        best = None
        for change in candidates(changed(config, changes), found):
            try:
                tried = run(changed(config, changes | change))
            except ValueError:
                continue
            if tried.peak < (best[1] if best else found).peak:
                best = change, tried
                if tried.fits:
                    break
        if best is None:
            break
        steps.append((best[0], found.peak - best[1].peak))
        changes, found = changes | best[0], best[1]
    return changes, found, steps
