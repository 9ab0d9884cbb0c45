"""Draws the report of a finished run again, from the files of its folder.

python -m experiments.report --workdir=DIR

Reads results.json, config.json, metrics.jsonl and samples.json, writes report.html. A run writes
its own report the same way, so the page comes out the same. Exit status: 0 written, 2 the folder
lacks something or holds something else.
"""

import os
import sys

from absl import flags

from experiments import commands

_WORKDIR = flags.DEFINE_string("workdir", None, "the run folder")
flags.mark_flag_as_required("workdir")


def main():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a page needs no accelerator, be it free or not
    from specjax.evaluation.report import report_run

    try:
        path = report_run(_WORKDIR.value)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if not (path.parent / "samples.json").is_file():
        print("no samples.json: the page has no samples and no notes of the run", file=sys.stderr)
    print(path)


if __name__ == "__main__":
    commands.run(main)
