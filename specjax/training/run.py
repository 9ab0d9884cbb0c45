"""The run folder: one config to a folder, recorded whole, checked on every rerun.

What training never read may be corrected until something was decoded with it.
"""

import json
import os
import pathlib
import tempfile

from ml_collections import ConfigDict

from specjax.files import write_text
from specjax.processes import lock

DECODING = tuple(
    f"eval.{name}"
    for name in ("rule", "temperatures", "top_k", "top_p", "max_new_tokens", "repeats",
                 "timing_repeats", "batch", "bootstrap")
)  # fmt: skip
"""Fields that are first read after training; the others of `eval` shape its data or its probes."""

SHOWN = 8  # different fields that a refusal names


def plain(config) -> dict:
    """A config as JSON-ready nested dictionaries (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict() if isinstance(config, ConfigDict) else config))


def _differences(old, new, prefix="") -> dict[str, str]:
    """Field -> what it is there and now, down to the fields that only one of them has."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix[:-1]: f"{old!r} there, {new!r} now"}
    found = {}
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}{key}"
        if key not in new:
            found[name] = "only there"
        elif key not in old:
            found[name] = "only now"
        else:
            found |= _differences(old[key], new[key], f"{name}.")
    return found


def _may_change(folder: pathlib.Path, field: str) -> bool:
    """Whether nothing in a run's folder depends on a field of its config."""
    made = {path.name for path in folder.iterdir()} - {"config.json", ".lock"}
    if made & {"answers", "results.json"}:
        return False
    return field in DECODING if made else field.startswith("eval.")


def open_run(
    workdir: str | None, config: ConfigDict, overrides: dict | None = None
) -> pathlib.Path:
    """Creates or reopens a run folder.

    Fields of `eval` may differ while nothing in the folder depends on them, so that a wrong one can
    be corrected after training; config.json is then written anew.

    Args:
      workdir: the folder; None makes a fresh one under runs/.
      config: the resolved config, written to config.json with the overrides given.

    Raises:
      ValueError: the folder holds a run of another config (names the fields that differ), or one
        that is running now.
      OSError: the folder cannot be written.
    """
    if workdir is None:
        pathlib.Path("runs").mkdir(exist_ok=True)
        workdir = tempfile.mkdtemp(prefix=f"{config.name}-", dir="runs")
        os.chmod(workdir, 0o755)
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"config": plain(config), "overrides": plain(overrides or {})}
    path, text = folder / "config.json", json.dumps(record, indent=2) + "\n"
    if path.is_file():
        try:
            old = json.loads(path.read_text())["config"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a run's config: {error!r}") from error
        different = _differences(old, record["config"])
        if refused := [field for field in different if not _may_change(folder, field)]:
            lines = [f"  {field}: {different[field]}" for field in refused[:SHOWN]]
            lines += [f"  and {len(refused) - SHOWN} more"] if len(refused) > SHOWN else []
            raise ValueError(
                f"{folder} holds another config's run; choose another --workdir or the same "
                "config. Different fields:\n" + "\n".join(lines)
            )
        if different:
            with lock(folder):
                write_text(path, text)
    else:
        write_text(path, text)
    return folder
