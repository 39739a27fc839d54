"""A process that works through the stages of a preparation; crew.py starts it.

    python -m jaxgpt.data.stages.worker WORK_FOLDER PARENT_PID WORKERS [joins]

What stops it goes into the work folder's error.json, so that all stop; one that joins says it and leaves
alone. It leaves when its parent is gone.
"""

import signal
import sys
from pathlib import Path

from jaxgpt.data.stages.order import STAGES
from jaxgpt.data.stages.read import READ, parts_of
from jaxgpt.data.work.work_folder import StoppedError, Work
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError, system_error_line


def main(folder: Path, parent: int, workers: int, joins: bool = False) -> int:
    """Work until all stages are done, or the work ends elsewhere; return the exit code.

    Args:
      folder: of the work.
      parent: the process that started this one.
      workers: that it may start; where there are fewer parts, each is encoded by several threads.
      joins: whether other processes began the work.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process
    work: Work | None = None
    try:
        work = Work(folder, parent)
        for stage in STAGES:
            work.work_through(stage)
            if stage is READ:
                work.threads = max(1, workers // len(parts_of(work)))
    except StoppedError:
        return 0
    except Exception as error:  # whatever it is: the parent says it
        if not (folder / "plan.json").exists() or (work is not None and not work.is_there):
            return 0
        known = isinstance(error, UserError | OSError)
        line = (system_error_line(error) if isinstance(error, OSError) else str(error)) if known else None
        if joins or work is None:
            say(f"error: {line or repr(error)}")
            return 2
        try:
            work.fail(error, line)
        except OSError:  # no room for that either
            say(f"error: {line or repr(error)}")
            return 2
        if line is None and not isinstance(error, ModuleNotFoundError):
            raise
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["joins"]))
