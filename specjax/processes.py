"""Several processes as one run: joining them, agreeing, and who writes.

Every process runs the same program on its part of the devices. What depends on one machine (files,
clocks) is decided by process 0 and told to the others, so that all take the same way; an error
there is an error everywhere, and nobody is left waiting in a collective.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins the processes of one run; call it before anything else uses jax.

    On TPU pods, Slurm, Kubernetes and Open MPI the arguments are found by jax. Under Slurm and Open
    MPI it then shows a process one GPU, by the process's number on its host, unless
    JAX_LOCAL_DEVICE_IDS in the environment names others.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes, process_id: how many there are, and which this one is.
      timeout: seconds to wait for the others at the start, and for a sign of life later.

    Raises:
      RuntimeError: the cluster is not recognised, or a process did not come in time.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            initialization_timeout=timeout, heartbeat_timeout_seconds=max(timeout, 10),
            shutdown_timeout_seconds=max(timeout, 10),
        )  # fmt: skip
        # All are here now: connections for collectives made later would time out while one of
        # them is still compiling.
        multihost_utils.sync_global_devices("joined")
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"distributed: could not join the other processes within {timeout} s: {reason}; every "
            "host must run the same command, and where the cluster is not recognised "
            "--coordinator, --num_processes and --process_id are needed"
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes logs, reports and answers."""
    return jax.process_index() == 0


def first(do: Callable):
    """What `do` returns in process 0 (JSON), in every process; only there is it called.

    Raises:
      What `do` raised, in every process (kinds other than OSError and ValueError: RuntimeError).
    """
    if jax.process_count() == 1:
        return do()
    value, own = _tried(do) if is_first() else (None, None)
    value, error = everyones([value, _told(own)])[0]
    if error:
        raise _raised(*error) from own
    return value


def together(do: Callable):
    """What `do` returns here, once it has returned in every process.

    In `do` nothing that one process alone can fail may come ahead of what all do together: the
    others would wait for it there.

    Raises:
      What `do` raised in any process, in every process, which it names (kinds as for `first`).
    """
    if jax.process_count() == 1:
        return do()
    value, own = _tried(do)
    errors = everyones(_told(own))
    failed = [i for i, other in enumerate(errors) if other]
    if failed:
        kind, text = errors[failed[0]]
        alike = all(other == errors[0] for other in errors)
        raise _raised(kind, text if alike else f"process {failed[0]}: {text}") from own
    return value


def everyones(value) -> list:
    """The JSON value of every process, in every process."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes())
        for row, size in zip(rows.reshape(len(sizes), -1), sizes, strict=True)
    ]


def _tried(do: Callable):
    """(what `do` returned, what it raised), of which one is None."""
    try:
        return do(), None
    except Exception as error:  # told to all, then raised by all
        return None, error


def _told(error: Exception | None) -> list[str] | None:
    return error and [type(error).__name__, str(error) or type(error).__name__]


def _raised(kind: str, text: str) -> Exception:
    kinds = {"ValueError": ValueError, "OSError": OSError, "FileNotFoundError": OSError}
    return kinds.get(kind, RuntimeError)(text)


def check_same(name: str, text: str) -> None:
    """Raises ValueError in every process unless all were given the same text (a config, say)."""
    if jax.process_count() == 1:
        return
    texts = everyones(text)
    others = [i for i, there in enumerate(texts) if there != texts[0]]
    if others:
        raise ValueError(
            f"{name}: differs between process 0 and {others}; every host must run the same command"
        )


def lock(folder: str | os.PathLike):
    """The open file that holds a run folder until it is closed.

    Raises:
      ValueError: another run holds it.
    """
    file = open(pathlib.Path(folder) / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "an unknown process"
        file.close()
        raise ValueError(f"{folder}: another run is writing here ({owner})") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} of {os.uname().nodename}")
    file.flush()
    return file


def check_shared(name: str, folder: str | os.PathLike, seconds: float = 5.0) -> None:
    """Raises ValueError in every process, with the field's `name`, unless all see one `folder`.

    Args:
      seconds: how long a network file system may take to show a new file.
    """
    if jax.process_count() == 1:
        return

    def mark() -> str:
        # Nobody can have looked for this name before: "not there" is remembered too.
        name = f".seen-{secrets.token_hex(8)}"
        (pathlib.Path(folder) / name).touch()
        return name

    token = pathlib.Path(folder) / first(mark)
    deadline = time.monotonic() + seconds
    while not (seen := os.access(token, os.R_OK)) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [i for i, there in enumerate(everyones(seen)) if not there]
    first(token.unlink)
    if blind:
        raise ValueError(f"{name}: processes {blind} do not see {folder}, as process 0 has it")


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike):
    """Holds a run folder for as long as the run lasts, so that no second run writes into it.

    Raises:
      ValueError: another run holds it.
    """
    held = []
    first(lambda: held.append(lock(folder)))
    try:
        yield
    finally:
        for file in held:
            file.close()
