"""What ran on the device while some steps were taken, from JAX's own profiler.

On a GPU the profiler (CUPTI) gives every kernel of every stream. On the CPU it gives the operations that
XLA's runtime starts in its threads, and when those ended that went on in other threads.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

GPU_PLANE, CPU_PLANE = "/device:GPU:0", "/host:CPU"
STREAM = "Stream #"  # lines of a GPU's plane; others repeat their events in other words
ENDED = "end: "


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel that ran once.

    Attributes:
      name: of the kernel; on the CPU that of the operation.
      op: name of its HLO instruction; "" where the profiler does not tell.
      start: ns.
      end: ns.
    """

    name: str
    op: str
    start: float
    end: float


def record(run: Callable[[], object]) -> list[Kernel]:
    """Return every kernel of a call that returns when the device has done its work.

    Raises:
      RuntimeError: the profiler saw none.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's calls are many and say nothing of kernels
    with tempfile.TemporaryDirectory(prefix="jaxgpt-profile-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        if not files:
            raise RuntimeError("the profiler wrote no profile")
        planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(files[0])).planes}
        if jax.default_backend() == "gpu":
            kernels = list(_gpu_kernels(planes.get(GPU_PLANE)))
        else:
            kernels = list(_cpu_kernels(planes.get(CPU_PLANE)))
    if not kernels:
        raise RuntimeError("the profiler saw no kernel (on a GPU it needs CUPTI, which jax[cuda12] brings)")
    return kernels


def _gpu_kernels(plane: Any) -> Iterator[Kernel]:
    lines = list(plane.lines) if plane is not None else []
    streams = [line for line in lines if line.name.startswith(STREAM)]
    for line in streams or [line for line in lines if line.name == "XLA Ops"]:
        for event in line.events:
            if event.duration_ns > 0:
                op = str(dict(event.stats).get("hlo_op", ""))
                yield Kernel(event.name, op, event.start_ns, event.end_ns)


def _cpu_kernels(plane: Any) -> Iterator[Kernel]:
    """Join the start of each operation with its end, which may be in another thread and later."""
    started: list[tuple[Any, Any, str]] = []
    ended: dict[tuple[str, Any], float] = {}
    for event in (event for line in plane.lines for event in line.events) if plane is not None else ():
        stats = dict(event.stats)
        if event.name.startswith(ENDED):
            ended[event.name.removeprefix(ENDED), stats.get("_c")] = event.start_ns
        elif "hlo_op" in stats:
            started.append((event, stats.get("_p"), str(stats["hlo_op"])))
    for event, context, op in started:
        end = max(event.end_ns, ended.get((event.name, context), 0.0))
        yield Kernel(event.name, op, event.start_ns, end)


def exclusive_times(kernels: Iterable[Kernel]) -> tuple[list[float], float]:
    """Divide the time from the first start to the last end among kernels.

    Returns:
      The time of each kernel, ns, in their order: where n run at once, each takes an n-th; and the time in
      which none runs. Together they are the whole.
    """
    listed = list(kernels)
    edges = sorted(
        edge
        for index, each in enumerate(listed)
        if each.end > each.start
        for edge in ((each.start, 1, index), (each.end, 0, index))
    )
    times, idle, running = [0.0] * len(listed), 0.0, set[int]()
    before = edges[0][0] if edges else 0.0
    for moment, starts, index in edges:
        if running:
            for each in running:
                times[each] += (moment - before) / len(running)
        else:
            idle += moment - before
        before = moment
        if starts:
            running.add(index)
        else:
            running.discard(index)
    return times, idle
