"""Measures what a machine does beside this program: `with NoiseMeter() as meter: ...; meter.noise()`.

Linux counts it in /proc/stat, /proc/loadavg and /proc/pressure/cpu. Where one of them is not there (macOS,
some containers) its figures are None.
"""

import dataclasses
import os
import resource
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxgpt_bench.common.rows import Noise

if TYPE_CHECKING:
    import psutil

PROC = Path("/proc")
BUSY_FIELDS = (0, 1, 2, 5, 6)  # of a line of /proc/stat: user, nice, system, irq, softirq
ALL_FIELDS, STEAL = slice(8), 7  # guests' time, which follows, is in user and nice already


@dataclasses.dataclass(frozen=True)
class CpuTime:
    """What the cores did since the machine was started, in ticks of the kernel.

    Attributes:
      busy: with processes and interrupts.
      stolen: taken by the host of a virtual machine.
      total: idle time included.
    """

    busy: int
    stolen: int
    total: int


@dataclasses.dataclass(frozen=True)
class _Reading:
    time_s: float
    cpu: CpuTime | None
    own_cpu_s: float | None
    load: float | None
    runnable: int | None
    some_us: int | None
    full_us: int | None


class NoiseMeter:
    """Reads the counters at its beginning, and again whenever it is asked.

    Args:
      root: where the kernel's files lie.
      own_cpu_s: returns the CPU seconds that count as ours; None where they can't be told.
      cores: that are ours to use; None takes those of this process.
    """

    def __init__(
        self,
        root: Path = PROC,
        own_cpu_s: Callable[[], float | None] | None = None,
        cores: Collection[int] | None = None,
    ) -> None:
        self._root, self._own_cpu_s = root, own_cpu_s or own_cpu_seconds
        self._cores = usable_core_numbers() if cores is None else cores
        self._first = self._read()

    def noise(self, probes: Sequence[float] = (), accepted: bool = False) -> Noise:
        """Return what happened since the beginning.

        Args:
          probes: a rate of the machine, measured again and again in that time, such as its bandwidth.
          accepted: the user takes the figures however busy the machine was.
        """
        first, last = self._first, self._read()
        seconds = last.time_s - first.time_s
        others, stolen = _cpu_shares(first, last)
        return Noise(
            seconds=seconds,
            load_before=first.load,
            load_after=last.load,
            runnable_before=first.runnable,
            runnable_after=last.runnable,
            others_cpu_share=others,
            stolen_share=stolen,
            pressure_some=_share(first.some_us, last.some_us, seconds),
            pressure_full=_share(first.full_us, last.full_us, seconds),
            probe_spread=(max(probes) - min(probes)) / statistics.median(probes) if probes else None,
            accepted=accepted,
        )

    def _read(self) -> _Reading:
        load = _text(self._root / "loadavg").split()
        running = load[3].partition("/")[0] if len(load) > 3 else ""
        pressure = dict(_pressure(_text(self._root / "pressure" / "cpu")))
        return _Reading(
            time_s=time.monotonic(),
            cpu=cpu_time(_text(self._root / "stat"), self._cores),
            own_cpu_s=self._own_cpu_s(),
            load=float(load[0]) if load else None,
            runnable=int(running) - 1 if running else None,  # this process, which reads the file, is running
            some_us=pressure.get("some"),
            full_us=pressure.get("full"),
        )


def cpu_time(stat: str, cores: Collection[int]) -> CpuTime | None:
    """Add up what cores did; all of the machine where one of them has no line; None where nothing is known.

    Args:
      stat: text of /proc/stat.
      cores: their numbers.
    """
    lines = {line.split()[0]: line.split()[1:] for line in stat.splitlines() if line.startswith("cpu")}
    names = [f"cpu{number}" for number in cores]
    if not names or not lines.keys() >= set(names):
        names = ["cpu"]
    chosen = [lines.get(name, []) for name in names]
    if any(len(line) <= STEAL for line in chosen):
        return None
    columns = [sum(map(int, column)) for column in zip(*(line[ALL_FIELDS] for line in chosen), strict=True)]
    return CpuTime(sum(columns[field] for field in BUSY_FIELDS), columns[STEAL], sum(columns))


def own_cpu_seconds(also: Sequence["psutil.Process"] = ()) -> float:
    """Return the CPU seconds of this process, its children and theirs, those that ended and those that run.

    Args:
      also: other processes that are measured, and their children.
    """
    import psutil

    ended = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(usage.ru_utime + usage.ru_stime for usage in ended)
    running = psutil.Process().children(recursive=True)
    for other in also:
        try:
            running += [other, *other.children(recursive=True)]
        except psutil.Error:  # it ended
            continue
    for process in set(running):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def usable_core_numbers() -> set[int]:
    """Return the cores on which this process may run; none where the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _cpu_shares(first: _Reading, last: _Reading) -> tuple[float | None, float | None]:
    """Return which shares of the cores' time others used and the host took."""
    if first.cpu is None or last.cpu is None or last.cpu.total <= first.cpu.total:
        return None, None
    total = last.cpu.total - first.cpu.total
    stolen = (last.cpu.stolen - first.cpu.stolen) / total
    if first.own_cpu_s is None or last.own_cpu_s is None:
        return None, stolen
    own = (last.own_cpu_s - first.own_cpu_s) * os.sysconf("SC_CLK_TCK")
    return max(last.cpu.busy - first.cpu.busy - own, 0.0) / total, stolen


def _share(first_us: int | None, last_us: int | None, seconds: float) -> float | None:
    if first_us is None or last_us is None or seconds <= 0:
        return None
    return (last_us - first_us) / 1e6 / seconds


def _pressure(text: str) -> Iterator[tuple[str, int]]:
    """Yield "some" and "full" with the microseconds of /proc/pressure/cpu."""
    for line in text.splitlines():
        kind, total = line.partition(" ")[0], line.rpartition("total=")[2]
        if total.isdigit():
            yield kind, int(total)


def _text(path: Path) -> str:
    """Return what a file of the kernel says; nothing where it is not there."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
