"""The ways to run a program: all are started, and for each use the fastest is kept.

Which is fastest depends on the machine, on what is asked (one token, a whole prompt) and on what else runs:
threads that spin are quickest on free cores and slowest beside busy processes.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence

from jaxgpt_bench.common.workers import Worker
from jaxgpt_bench.peers.peer import Choice
from jaxgpt_bench.speed.contestants import Contestant, shared_environment

TRIALS = 5
CLEAR = 2.0  # times as slow: not tried again


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A process of a contestant, and how it runs there."""

    worker: Worker
    choice: Choice

    @property
    def name(self) -> str:
        """Name of the row."""
        return self.worker.name


def started(contestant: Contestant, warm_up: Callable[[Worker], object]) -> list[Entrant]:
    """Start a contestant in each of its ways.

    Args:
      contestant: whose program says them.
      warm_up: is done with each of its processes.

    Raises:
      RuntimeError: it runs in none of them.
    """
    found: list[Entrant] = []
    failed: list[RuntimeError] = []
    try:
        for choice in contestant.program.choices(contestant.precision):
            try:
                found.append(Entrant(_process(contestant, choice), choice))
            except RuntimeError as error:
                failed.append(error)
                continue
            try:
                warm_up(found[-1].worker)
            except RuntimeError as error:
                failed.append(error)
                found.pop().worker.close()
    except BaseException:
        close(found)
        raise
    if not found:
        raise failed[0]
    return found


def _process(contestant: Contestant, choice: Choice) -> Worker:
    environment = {**shared_environment(contestant.threads), **choice.environment}
    order = contestant.order(choice.settings)
    return Worker(contestant.name, "jaxgpt_bench.speed.contestant_process", order, environment)


def fastest(entrants: Sequence[Entrant], seconds: Callable[[Worker], float]) -> Entrant:
    """Return the one whose median time is the least, in turn with the others.

    Args:
      entrants: of one contestant.
      seconds: times a process once.

    Raises:
      RuntimeError: one of them stopped; all are ended.
    """
    if len(entrants) == 1:
        return entrants[0]
    try:
        times = [[seconds(each.worker)] for each in entrants]
        for _ in range(TRIALS - 1 if max(times)[0] < CLEAR * min(times)[0] else 0):
            for own, each in zip(times, entrants, strict=True):
                own.append(seconds(each.worker))
    except BaseException:
        close(entrants)
        raise
    medians = [statistics.median(own) for own in times]
    return entrants[medians.index(min(medians))]


def close(entrants: Iterable[Entrant], but: Sequence[Entrant] = ()) -> None:
    """End all processes but those."""
    kept = [each.worker for each in but]
    for each in entrants:
        if each.worker not in kept:
            each.worker.close()
