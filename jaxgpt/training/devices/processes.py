"""Several processes that train one model: joining them, and agreeing.

JAX finds Slurm, Kubernetes (with a coordinator service), Open MPI and Cloud TPU by itself; elsewhere each
process is told the coordinator's address, how many there are and which one it is.
"""

import contextlib
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.shared.entry import leave
from jaxgpt.shared.errors import UserError, system_error_line

RETRY_S = 0.5


class CommonError(UserError):
    """A UserError that every process raises at the same place, so that all end in order."""


def join_processes(
    coordinator: str | None, count: int | None, index: int | None, found_by_jax: bool, timeout_s: int
) -> None:
    """Connect the processes of a training; nothing when it is a single one.

    Args:
      coordinator: host:port of process 0.
      count: number of processes.
      index: which one this is, from 0.
      found_by_jax: take all three from the cluster's environment.
      timeout_s: how long to wait for the others.

    Raises:
      UserError: the flags do not fit each other, or the others can't be reached in time.
    """
    given = (coordinator, count, index)
    if not found_by_jax and given == (None, None, None):
        return
    if found_by_jax:
        if given != (None, None, None):
            raise UserError("--distributed finds coordinator, count and index by itself; give it alone")
    elif coordinator is None or count is None or index is None:
        raise UserError("give --coordinator HOST:PORT, --process-count N and --process-index I together")
    else:
        if count < 1 or not 0 <= index < count:
            raise UserError(f"--process-index {index} must lie in [0, {count}) (--process-count {count})")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator {coordinator!r} is no HOST:PORT, such as 10.0.0.1:8476")
        if index > 0:
            _wait_for(host, int(port), timeout_s)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            # Else JAX asks the job that it finds which devices are this process's: one, under Slurm.
            cluster_detection_method=None if found_by_jax else "deactivate",
            initialization_timeout=timeout_s,
        )
    except Exception as error:  # ValueError, RuntimeError and XlaRuntimeError
        if found_by_jax and isinstance(error, ValueError):
            raise UserError(
                "--distributed: JAX finds no Slurm, Kubernetes or Open MPI job here; "
                "give --coordinator HOST:PORT --process-count N --process-index I"
            ) from None
        line = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"the {count or 'other'} processes did not meet at {coordinator or 'the coordinator'} within "
            f"{timeout_s} s ({line}); were all of them started, with the same address?"
        ) from None


def _wait_for(host: str, port: int, timeout_s: int) -> None:
    """Return when a port answers (JAX itself would end the process without a Python exception)."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), RETRY_S)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"coordinator {host}:{port} can't be reached within {timeout_s} s ({error}); "
                    "is process 0 running there, and the port open?"
                ) from None
            time.sleep(RETRY_S)


def is_main_process() -> bool:
    """Whether this process writes what is written once."""
    return bool(jax.process_index() == 0)


def on_main_process(action: Callable[[], None]) -> None:
    """Run an action in process 0 alone; every process goes on when it is done.

    Raises:
      UserError: the action raised one.
      OSError: the action raised one, and there is one process.
      CommonError: with several processes in place of both, in all of them.
    """
    error: UserError | OSError | None = None
    if is_main_process():
        try:
            action()
        except (UserError, OSError) as caught:
            error = caught
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and error is None:
            raise CommonError("process 0 stopped with an error; its own message tells why")
        if error is not None:
            raise CommonError(system_error_line(error) if isinstance(error, OSError) else error) from error
    if error is not None:
        raise error


@contextlib.contextmanager
def ending_the_others() -> Iterator[None]:
    """End this process at once where something fails in it alone, as a full disk does; all but CommonError.

    The others wait for it in a product or a barrier, and JAX, which ends orderly, would wait for them.
    """
    try:
        yield
    except CommonError:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, OSError):
            line = system_error_line(error)
        elif isinstance(error, UserError):
            line = str(error)
        else:
            traceback.print_exc()
            line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        leave(f"error: {line}; the other processes end too", code=2)


def all_agree(ok: bool) -> bool:
    """Whether every process says yes."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.int32(ok))))


def all_come(to: str, timeout_s: float) -> bool:
    """Wait for the other processes; whether all came to the same place in time, for which each asks once."""
    if jax.process_count() == 1:
        return True
    from jax._src import distributed  # JAX's own barriers have no limit

    client: Any = distributed.global_state.client
    try:
        client.wait_at_barrier(f"jaxgpt:{to}", int(1000 * timeout_s))
    except Exception:  # of XLA, which has no type of its own for it
        return False
    return True


def of_main_process(number: int) -> int:
    """Return process 0's number in every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
