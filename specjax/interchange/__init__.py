"""Drafters in and out of other programs' folders (docs/interchange.md).

A layout is a module with `FAMILY`, the one drafter class it holds, `write` and `read`. Nothing in a
folder is executed, and what a drafter here cannot do is refused by the name of its key.
"""

import pathlib
from typing import Any

import jax

from specjax.interchange import eagle3, fasteagle, speculators
from specjax.interchange.folder import DTYPES, refuse, write_folder
from specjax.models.target import Target

LAYOUTS = {"eagle3": eagle3, "speculators": speculators, "fasteagle": fasteagle}
FORMATS = ("specjax", *LAYOUTS)


def is_foreign(record: dict[str, Any]) -> bool:
    """Whether a drafter's config.json is another program's, or in a layout meant for others."""
    return record.get("format") != "specjax" and bool(
        {"speculators_model_type", "model_type"} & set(record)
    )


def import_drafter(folder, record: dict[str, Any], target: Target):
    """(definition, parameters) of the drafter in a foreign folder.

    Args:
      folder: config.json and safetensors in one of `LAYOUTS`.
      record: its config.json.
      target: the model it drafts for.

    Raises:
      FileNotFoundError: a file is missing, or holds its weights as a pickle only.
      ValueError: damaged files, another target, or a variant that is not supported (names the key).
    """
    kind = record.get("speculators_model_type")
    if kind is None:
        return eagle3.read(folder, record, target)
    layouts = {"eagle3": speculators, "fasteagle": fasteagle}
    if kind not in layouts:
        source = pathlib.Path(folder) / "config.json"
        refuse(source, "speculators_model_type", f"{kind!r} is not one of {tuple(layouts)}")
    return layouts[kind].read(folder, record, target)


def export_drafter(
    drafter, target: Target, folder, format: str, verifier: str | None = None, dtype="float32"
) -> int:
    """Writes a drafter for another program; returns the number of tensors.

    Args:
      drafter: from `init_drafter`, `load_drafter` or training.
      target: the model it drafts for.
      folder: new, or empty.
      format: one of `FORMATS`.
      verifier: the target's hub id, for layouts that name it.
      dtype: of the weights in the file; "float32" loses nothing.

    Raises:
      ValueError: a format that does not hold this family, a field that it cannot say, an unknown
        dtype, a verifier that is no hub id, or a drafter of another target; nothing is written.
      FileExistsError: the folder is not empty, or is a file.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not an empty folder")
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} is unknown; one of {FORMATS}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not supported; one of {DTYPES}")
    if drafter.fingerprint != target.fingerprint:
        raise ValueError(f"drafter {drafter.name!r} was made for another target")
    if format == "specjax":
        if dtype != "float32" or verifier is not None:
            raise ValueError("dtype, verifier: a specjax folder keeps the drafter as it is")
        drafter.save(folder)
        return len(jax.tree.leaves(drafter.params))
    layout = LAYOUTS[format]
    if drafter.name != layout.FAMILY.name:
        raise ValueError(
            f"format: {format!r} holds drafters of family {layout.FAMILY.name!r}, not "
            f"{drafter.name!r}"
        )
    tensors, record = layout.write(drafter.definition, drafter.params, target, verifier, dtype)
    return write_folder(folder, tensors, record, dtype)
