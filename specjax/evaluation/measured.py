"""What an unfinished run has measured, kept in its folder: the same command goes on after it.

A measurement counts again only in the circumstances that it was made in: the same contenders with
the same weights, settings, machine and versions, specjax's own code included. All of it goes when
the run is finished, so that a finished run's folder, run again, is measured again.
"""

import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from specjax.evaluation.results import plain
from specjax.files import write_text
from specjax.processes import first, together
from specjax.progress import say

FOLDER = "measured"


def measured(folder: str | os.PathLike, name: str, circumstances: dict, measure: Callable):
    """What `measure` returned, in this start of the run or an earlier one; as JSON has it.

    Args:
      folder: the run's.
      name: of the measurement, unique in the run.
      circumstances: all that it depends on; JSON, or NumPy's and tuples for it.
      measure: called where nothing is kept; several processes call it together.

    Raises:
      OSError: it cannot be written.
    """
    path = pathlib.Path(folder) / FOLDER / f"{name.replace('/', '-')}.json"
    text = json.dumps([code(), plain(circumstances)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    value = first(lambda: _kept(path, digest))
    if value is not None:
        say(f"{name}: as measured before")
        return value
    value = plain(measure())
    record = {"circumstances": digest, "value": value}
    together(lambda: write_text(path, json.dumps(record) + "\n"))
    return value


def forget(folder: str | os.PathLike) -> None:
    """Removes what was kept, once the run's results are written; for the first process."""
    shutil.rmtree(pathlib.Path(folder) / FOLDER, ignore_errors=True)


def norms(params) -> list[float]:
    """A number for every array, by which weights that have changed are told."""
    return [float(np.asarray(n)) for n in _norms([jnp.asarray(w) for w in jax.tree.leaves(params)])]


@jax.jit
def _norms(leaves):
    return [jnp.linalg.norm(w.astype(jnp.float32)) for w in leaves]


@functools.cache
def code() -> str:
    """Changes with specjax's source."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _kept(path: pathlib.Path, digest: str):
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(record, dict) and record.get("circumstances") == digest
    return record.get("value") if same else None
