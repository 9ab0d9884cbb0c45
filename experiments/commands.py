"""What command lines share: how a wrong flag ends a program, with status 2."""

import pathlib
import sys

from absl import app, flags


def usage_error(flag: str, error) -> app.UsageError:
    """An error that names the flag and ends with status 2."""
    return app.UsageError(f"--{flag}: {error}", exitcode=2)


def parse_flags(argv):
    """absl's own parser ends with status 1, which some programs need for something else."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        program = pathlib.Path(argv[0]).stem
        print(f"{program}: {error} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)
