"""Result rows put together: over tasks and temperatures, and over seeds."""

from collections.abc import Sequence

import numpy as np

from specjax.evaluation.records import VANILLA
from specjax.evaluation.tables import setting


def by_setting(
    rows: Sequence[dict], key: str = "tau"
) -> tuple[list[str], list[str], dict[tuple[str, str], dict[int, float]]]:
    """(methods, settings, values by seed): `key` of every drafting method in every setting.

    Names are in order of appearance; the values of (method, setting) are {seed: value}, and there
    is no entry for a method that did not run in a setting.

    Raises:
      ValueError: two rows of one method, setting and seed.
    """
    values: dict[tuple[str, str], dict[int, float]] = {}
    methods, settings = {}, {}
    for row in rows:
        if row["method"] == VANILLA:
            continue
        where = row["method"], setting(row)
        seeds = values.setdefault(where, {})
        if row["seed"] in seeds:
            raise ValueError(f"{where[0]}, {where[1]}, seed {row['seed']}: given twice")
        seeds[row["seed"]] = row[key]
        methods[where[0]], settings[where[1]] = None, None
    return list(methods), list(settings), values


def mean_by_setting(rows: Sequence[dict], key: str = "tau"):
    """(methods, settings, mean_MxS over seeds), NaN where a method did not run."""
    methods, settings, values = by_setting(rows, key)
    mean_MxS = np.full((len(methods), len(settings)), np.nan)
    for (method, where), seeds in values.items():
        mean_MxS[methods.index(method), settings.index(where)] = np.mean(list(seeds.values()))
    return methods, settings, mean_MxS


def seed_table(rows: Sequence[dict], key: str = "tau") -> str:
    """Markdown: `key` by seed, its mean and standard deviation over seeds ("-" for one seed)."""
    values = by_setting(rows, key)[2]
    seeds = sorted({seed for found in values.values() for seed in found})
    lines = [
        ["method", "setting", *(f"seed {seed}" for seed in seeds), f"mean {key}", "sd"],
        [":--", ":--", *["--:"] * (len(seeds) + 2)],
    ]
    for (method, where), found in values.items():
        numbers = list(found.values())
        spread = f"{np.std(numbers, ddof=1):.2f}" if len(numbers) > 1 else "-"
        cells = [f"{found[seed]:.2f}" if seed in found else "-" for seed in seeds]
        lines.append([method, where, *cells, f"{np.mean(numbers):.2f}", spread])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
