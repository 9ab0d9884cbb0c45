"""Converts a drafter from or to other programs' layouts (docs/interchange.md).

python -m experiments.convert --drafter=FOLDER --target=FOLDER --format=NAME --out=FOLDER

The format of --drafter is recognised. Exit status: 0 if --out was written, 2 if the flags or the
files they name are wrong; then nothing was written.
"""

import pathlib

from absl import app, flags

from experiments import commands
from specjax import load_drafter, load_target
from specjax.console import make_console
from specjax.interchange import DTYPES, FORMATS, export_drafter

_DRAFTER = flags.DEFINE_string("drafter", None, "drafter folder, in any of the formats")
_TARGET = flags.DEFINE_string("target", None, "'builtin', a model folder or a hub id")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "of --out")
_OUT = flags.DEFINE_string("out", None, "folder to write; new, or empty")
_VERIFIER = flags.DEFINE_string(
    "verifier", None, "hub id of the target, for formats that name it; none: --target if it is one"
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "of the weights in --out")

NOTES = {
    "eagle3": "the draft tree is not part of this format",
    "speculators": "of the draft tree, this format keeps the depth",
    "fasteagle": "no server loads this format yet",
}


def verifier_of(target: str, format: str) -> str | None:
    """The hub id to write: --target, where it is one and the format has a place for it."""
    is_hub_id = target.count("/") == 1 and not pathlib.Path(target).exists()
    return target if is_hub_id and format in ("speculators", "fasteagle") else None


def convert(drafter: str, target: str, format: str, out: str, verifier: str | None, dtype: str):
    """Loads, writes and says so. Raises ValueError or OSError naming what is wrong."""
    console = make_console(soft_wrap=True)
    model = load_target(target)
    loaded = load_drafter(drafter, model)
    verifier = verifier or verifier_of(target, format)
    count = export_drafter(loaded, model, out, format, verifier, dtype)
    console.print(f"{loaded.name}, {loaded.num_params:,} parameters, for {model.name}")
    console.print(f"{out}: {format}, {count} tensors, {dtype}")
    if format in NOTES:
        console.print(f"note: {NOTES[format]}")


def main():
    try:
        convert(
            _DRAFTER.value, _TARGET.value, _FORMAT.value, _OUT.value, _VERIFIER.value, _DTYPE.value
        )
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from error


if __name__ == "__main__":
    flags.mark_flags_as_required(["drafter", "target", "format", "out"])
    commands.run(main)
