"""What command lines share: how a wrong flag ends a program, with status 2."""

import contextlib
import pathlib
import sys

from absl import app, flags


def usage_error(flag: str, error) -> app.UsageError:
    """An error that names the flag and ends with status 2."""
    return app.UsageError(f"--{flag}: {error}", exitcode=2)


class Refused(ValueError):
    """What was asked for cannot be; its message is all that a user needs."""


@contextlib.contextmanager
def refusals():
    """Around what checks and reads what a user gave: its ValueError or OSError becomes `Refused`.

    Later ones, deep in a step, are nobody's wrong flag and keep their traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error


def reason(error: flags.Error) -> str:
    """What a flag's error says; of a recipe that refuses its preset the last line alone.

    Other errors of a recipe come with their traceback, for they are the recipe's own mistake.
    """
    lines = str(error).strip().splitlines()
    refused = "Traceback" in str(error) and lines[-1].startswith("ValueError: ")
    return lines[-1].replace("ValueError", "--config") if refused else str(error)


def parse_flags(argv):
    """absl's own parser ends with status 1, which some programs need for something else."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        program = pathlib.Path(argv[0]).stem
        print(f"{program}: {reason(error)} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)
