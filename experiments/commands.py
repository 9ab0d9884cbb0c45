"""What command lines share: flags and nothing else; what is wrong with one ends with status 2."""

import contextlib
import pathlib
import sys
import traceback
from collections.abc import Callable

from absl import app, flags


def run(main: Callable[[], None]) -> None:
    """Runs a program once its flags are read; an app.UsageError ends it with a line and status 2.

    `main` takes no arguments: what the command line has beside flags is refused.
    """

    def with_flags_only(argv):
        try:
            if len(argv) > 1:
                raise app.UsageError(f"unexpected argument {argv[1]!r}")
            main()
        except app.UsageError as error:
            _end(str(error))

    app.run(with_flags_only, flags_parser=_parse_flags)


def usage_error(flag: str, error) -> app.UsageError:
    """An error that names the flag, once."""
    named = str(error).startswith(f"{flag}:")
    return app.UsageError(f"--{error}" if named else f"--{flag}: {error}")


def tried(flag: str, call: Callable, *args, **kwargs):
    """What the call returns; where it refuses, an app.UsageError that names the flag."""
    try:
        return call(*args, **kwargs)
    except (ValueError, OSError, ImportError) as error:
        raise usage_error(flag, error) from error


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


def _reason(error) -> str:
    """What a flag's error says; of a recipe that refuses its preset the last line alone.

    Other errors of a recipe come with their traceback, for they are the recipe's own mistake.
    """
    lines = str(error).strip().splitlines()
    refused = "Traceback" in str(error) and lines[-1].startswith("ValueError: ")
    return lines[-1].replace("ValueError", "--config") if refused else str(error)


def _parse_flags(argv):
    """absl's own parser ends with status 1, which some programs need for something else."""
    try:
        arguments = flags.FLAGS(argv)
        # A recipe whose file is missing raises OSError, but only when it is looked at.
        getattr(getattr(flags.FLAGS, "config", None), "name", None)
        return arguments
    except (flags.Error, OSError) as error:
        _end(f"{_reason(error)} (--help lists the flags)")
    except AttributeError as error:  # --config.FIELD of a field that there is not
        if any(frame.name == "get_config" for frame in traceback.extract_tb(error.__traceback__)):
            raise  # the recipe's own mistake
        _end(f"--config: {error} (--help lists the flags)")


def _end(words: str):
    print(f"{pathlib.Path(sys.argv[0]).stem}: {words}", file=sys.stderr)
    sys.exit(2)
