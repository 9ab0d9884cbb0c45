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

    On TPU pods, Slurm, Kubernetes and Open MPI the arguments are found by jax.

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
    outcome = None
    if is_first():
        try:
            outcome = {"value": do()}
        except Exception as error:  # told to all, then raised by all
            outcome = {"error": str(error), "kind": type(error).__name__}
    outcome = _told(outcome)
    if "error" in outcome:
        kinds = {"ValueError": ValueError, "OSError": OSError, "FileNotFoundError": OSError}
        raise kinds.get(outcome["kind"], RuntimeError)(outcome["error"])
    return outcome["value"]


def _told(value):
    """Process 0's JSON value in every process."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first() else np.zeros(0)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = data
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def everywhere(holds: bool) -> bool:
    """Whether something holds in every process."""
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.array([holds]))))


def check_same(name: str, text: str) -> None:
    """Raises ValueError in every process unless all were given the same text (a config, say)."""
    if jax.process_count() == 1:
        return
    there = first(lambda: text)
    agreed = multihost_utils.process_allgather(np.array([there == text]))
    others = np.flatnonzero(~np.asarray(agreed).reshape(-1)).tolist()
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
