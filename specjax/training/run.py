"""The run folder: one config to a folder, recorded whole, checked on every rerun."""

import json
import os
import pathlib
import tempfile

from ml_collections import ConfigDict

from specjax.files import write_text


def plain(config) -> dict:
    """A config as JSON-ready nested dictionaries (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict() if isinstance(config, ConfigDict) else config))


def _differences(old, new, prefix=""):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield f"{prefix[:-1]}: {old!r} there, {new!r} now"


def open_run(
    workdir: str | None, config: ConfigDict, overrides: dict | None = None
) -> pathlib.Path:
    """Creates or reopens a run folder.

    Args:
      workdir: the folder; None makes a fresh one under runs/.
      config: the resolved config, written to config.json with the overrides given.

    Raises:
      ValueError: the folder holds a run of another config (names the fields that differ).
      OSError: the folder cannot be written.
    """
    if workdir is None:
        pathlib.Path("runs").mkdir(exist_ok=True)
        workdir = tempfile.mkdtemp(prefix=f"{config.name}-", dir="runs")
        os.chmod(workdir, 0o755)
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"config": plain(config), "overrides": plain(overrides or {})}
    path = folder / "config.json"
    if path.is_file():
        try:
            old = json.loads(path.read_text())["config"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a run's config: {error!r}") from error
        different = list(_differences(old, record["config"]))
        if different:
            raise ValueError(
                f"{folder} holds another config's run; choose another --workdir or the same "
                "config. Different fields: " + "; ".join(different[:8])
            )
    else:
        write_text(path, json.dumps(record, indent=2) + "\n")
    return folder
