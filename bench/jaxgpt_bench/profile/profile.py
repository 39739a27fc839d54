"""A step's profile: its kernels by kind, the longest ones, and the functions that they come from."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax

from jaxgpt.training.devices.precision import peak_flops
from jaxgpt_bench.common.step_rows import KernelRow, KindRow, SourceRow, StepProfile
from jaxgpt_bench.profile.hlo import Instruction, Program
from jaxgpt_bench.profile.kinds import CONTROL, NO_KERNEL, kind_of, product_dtype
from jaxgpt_bench.profile.rates import DTYPES, copy_rate, product_rate
from jaxgpt_bench.profile.trace import Kernel, exclusive_times, record

PACKAGE = "jaxgpt/training"
HELPERS = ("model/numerics.py", "model/layers.py")  # who calls them tells more
TOP_KERNELS = 15
TOP_SOURCES = 12
PRECISION_OF = {"tf32": "fp32", "bf16": "bf16", "fp16": "fp16"}  # columns of the datasheets' table
ATTENTION_IS_IN = ("bf16", "fp16")


@dataclasses.dataclass(frozen=True)
class Timed:
    """A kernel with its own part of the time (ns), its kind, and its instruction where that is known."""

    kernel: Kernel
    ns: float
    kind: str
    instruction: Instruction | None


def profile_steps(take_steps: Callable[[], object], steps: int, compiled: jax.stages.Compiled) -> StepProfile:
    """Profile some steps.

    Args:
      take_steps: takes them, one right after the other, and returns when the device is done.
      steps: how many.
      compiled: the step.

    Raises:
      RuntimeError: the profiler saw no kernel.
    """
    kernels = record(take_steps)
    gpu = jax.default_backend() == "gpu"
    program = Program(compiled.as_text() or "")
    found = describe(kernels, program, gpu)
    dtypes = {dtype for each in found if (dtype := product_dtype(each.kind))} & DTYPES.keys()
    products = {dtype: product_rate(dtype) for dtype in sorted(dtypes)}
    return summarize(found, program, steps, products, copy_rate(), jax.devices()[0].device_kind)


def describe(kernels: Iterable[Kernel], program: Program, gpu: bool) -> list[Timed]:
    """Tell kind and time of each kernel; what runs nothing itself (a loop) is left out, gaps are added."""
    known: dict[tuple[str, str], tuple[str, Instruction | None]] = {}
    listed = []
    for kernel in kernels:
        key = (kernel.name, kernel.op)
        if key not in known:
            instruction = program[kernel.op] or program[kernel.name]
            known[key] = (kind_of(kernel.name, instruction, program, gpu), instruction)
        if known[key][0] != CONTROL:
            listed.append((kernel, *known[key]))
    times, idle = exclusive_times(kernel for kernel, _, _ in listed)
    timed = [Timed(kernel, ns, kind, op) for (kernel, kind, op), ns in zip(listed, times, strict=True)]
    return [*timed, Timed(Kernel("", "", 0.0, 0.0), idle, NO_KERNEL, None)]


def summarize(
    found: list[Timed],
    program: Program,
    steps: int,
    products: Mapping[str, float],
    copies: float | None,
    device: str,
) -> StepProfile:
    """Add up.

    Args:
      found: every kernel of the steps, and the gaps.
      program: the step.
      steps: that were taken.
      products: measured FLOP/s by dtype.
      copies: measured bytes/s.
      device: kind of the device.
    """
    total = sum(each.ns for each in found)
    busy = [each for each in found if each.kind != NO_KERNEL]
    by_kind: dict[str, list[Timed]] = collections.defaultdict(list)
    for each in found:
        by_kind[each.kind].append(each)
    ceilings = _Ceilings(products, copies, device)
    kinds = [_kind_row(kind, each, program, steps, total, ceilings) for kind, each in by_kind.items()]
    known = sum(each.ns for each in busy if each.instruction is not None)
    return StepProfile(
        steps=steps,
        step_ms=total / steps / 1e6,
        known=known / max(sum(each.ns for each in busy), 1.0),
        product_tflops={dtype: rate / 1e12 for dtype, rate in products.items()},
        memory_gb_s=None if copies is None else copies / 1e9,
        kinds=tuple(sorted(kinds, key=lambda row: -row.ms)),
        kernels=_kernel_rows(busy, program, steps, total, ceilings),
        sources=_source_rows(busy, program, steps, total),
    )


@dataclasses.dataclass(frozen=True)
class _Ceilings:
    products: Mapping[str, float]
    copies: float | None
    device: str

    def measured(self, dtype: str) -> float | None:
        """Return the measured FLOP/s of a dtype; of attention in that of the products beside it."""
        wanted = ATTENTION_IS_IN if dtype == "attention" else (dtype,)
        return next((self.products[each] for each in wanted if each in self.products), None)

    def datasheet(self, dtype: str) -> float | None:
        """Return the datasheet's FLOP/s of a dtype."""
        if dtype == "attention":
            dtype = next((each for each in ATTENTION_IS_IN if each in self.products), "")
        return peak_flops(self.device, PRECISION_OF[dtype]) if dtype in PRECISION_OF else None  # type: ignore[arg-type]


def _kind_row(
    kind: str, found: list[Timed], program: Program, steps: int, total: float, ceilings: _Ceilings
) -> KindRow:
    ns = sum(each.ns for each in found)
    return KindRow(
        kind=kind,
        ms=ns / steps / 1e6,
        share=ns / max(total, 1.0),
        kernels=0.0 if kind == NO_KERNEL else len(found) / steps,
        **vars(_reached(kind, found, program, ceilings)),
    )


@dataclasses.dataclass(frozen=True)
class _Reached:
    tflops: float | None = None
    gb_s: float | None = None
    of_measured: float | None = None
    of_datasheet: float | None = None


def _reached(kind: str, found: list[Timed], program: Program, ceilings: _Ceilings) -> _Reached:
    """Return the rate of kernels of one kind: of FLOPs where they multiply, else of bytes."""
    flops, moved, ns = _work(found, program)
    if flops and ns:
        dtype, rate = product_dtype(kind) or "attention", flops / ns * 1e9
        measured, datasheet = ceilings.measured(dtype), ceilings.datasheet(dtype)
        return _Reached(
            tflops=rate / 1e12,
            of_measured=rate / measured if measured else None,
            of_datasheet=rate / datasheet if datasheet else None,
        )
    if moved and ns:
        share = moved / ns * 1e9 / ceilings.copies if ceilings.copies else None
        return _Reached(gb_s=moved / ns, of_measured=share)
    return _Reached()


def _work(found: list[Timed], program: Program) -> tuple[float, float, float]:
    """Return FLOPs and bytes of the kernels whose instruction is known, and their time in ns.

    An instruction that starts several kernels (a product, then the sum of its parts) ran as often as the one
    that it starts most often.
    """
    runs: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    instructions = {}
    ns = 0.0
    for each in found:
        if each.instruction is not None:
            instructions[each.instruction.name] = each.instruction
            runs[each.instruction.name][each.kernel.name] += 1
            ns += each.ns
    flops = moved = 0.0
    for name, counts in runs.items():
        flops += program.flops(instructions[name]) * max(counts.values())
        moved += program.bytes(instructions[name]) * max(counts.values())
    return flops, moved, ns


def _kernel_rows(
    busy: list[Timed], program: Program, steps: int, total: float, ceilings: _Ceilings
) -> tuple[KernelRow, ...]:
    """Return the longest kernels: one name, one kind, one source."""
    sources = _sources(busy, program)
    grouped: dict[tuple[str, str, str], list[Timed]] = collections.defaultdict(list)
    for each in busy:
        grouped[each.kernel.name, each.kind, sources[_name(each)]].append(each)
    longest = sorted(grouped.items(), key=lambda item: -sum(each.ns for each in item[1]))[:TOP_KERNELS]
    rows = []
    for (name, kind, source), found in longest:
        ns = sum(each.ns for each in found)
        ops = list(dict.fromkeys(_name(each) for each in found))
        reached = _reached(kind, found, program, ceilings)
        rows.append(
            KernelRow(
                name=name,
                kind=kind,
                ms=ns / steps / 1e6,
                share=ns / max(total, 1.0),
                count=len(found) / steps,
                tflops=reached.tflops,
                gb_s=reached.gb_s,
                of_measured=reached.of_measured,
                op=ops[0] + (f" and {len(ops) - 1} more" if len(ops) > 1 else ""),
                source=source,
            )
        )
    return tuple(rows)


def _name(timed: Timed) -> str:
    return "" if timed.instruction is None else timed.instruction.name


def _sources(busy: list[Timed], program: Program) -> dict[str, str]:
    """Return line and function of each instruction by its name; "" where that is not known."""
    instructions = {_name(each): each.instruction for each in busy}
    return {
        name: "" if each is None else program.source(each, PACKAGE, HELPERS)
        for name, each in instructions.items()
    }


def _source_rows(busy: list[Timed], program: Program, steps: int, total: float) -> tuple[SourceRow, ...]:
    sources = _sources(busy, program)
    times: dict[str, float] = collections.defaultdict(float)
    for each in busy:
        file, _, rest = sources[_name(each)].partition(":")
        times[f"{file} {rest.partition(' ')[2]}".strip() or "not known"] += each.ns
    longest = sorted(times.items(), key=lambda item: -item[1])[:TOP_SOURCES]
    return tuple(
        SourceRow(source=source, ms=ns / steps / 1e6, share=ns / max(total, 1.0)) for source, ns in longest
    )
