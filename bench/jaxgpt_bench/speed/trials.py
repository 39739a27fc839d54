"""The ways to run a program: all are started, and for each use the fastest is kept.

Which is fastest depends on the machine, on what is asked (one token, a whole prompt) and on what else runs:
threads that spin are quickest on free cores and slowest beside busy processes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from jaxgpt_bench.common.workers import Worker
from jaxgpt_bench.peers.peer import Choice
from jaxgpt_bench.speed.contestants import Contestant, shared_environment

TRIALS = 3
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
    """Return the one that takes the least time, in turn with the others.

    Args:
      entrants: of one contestant.
      seconds: times a process once.

    Raises:
      RuntimeError: one of them stopped; all are ended.
    """
    if len(entrants) == 1:
        return entrants[0]
    try:
        times = [seconds(each.worker) for each in entrants]
        for _ in range(TRIALS - 1 if max(times) < CLEAR * min(times) else 0):
            for index, each in enumerate(entrants):
                times[index] += seconds(each.worker)
    except BaseException:
        close(entrants)
        raise
    return entrants[times.index(min(times))]


def close(entrants: Iterable[Entrant], but: Sequence[Entrant] = ()) -> None:
    """End all processes but those."""
    kept = [each.worker for each in but]
    for each in entrants:
        if each.worker not in kept:
            each.worker.close()
