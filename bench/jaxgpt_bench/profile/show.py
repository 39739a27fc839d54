"""Prints profiles."""

from collections.abc import Sequence

from jaxgpt.shared.console import say, stderr
from jaxgpt_bench.common.step_rows import StepProfile, StepRow
from jaxgpt_bench.common.tables import KERNELS, KINDS, SOURCES, Table, table


def show_profiles(rows: Sequence[StepRow]) -> None:
    """Print where the step of the first row goes, and the kinds of kernels of every row side by side."""
    profiles = {}
    for row in rows:
        if row.profile is not None:
            profiles[row.name] = row.profile
            busy = sum(each.ms for each in row.profile.kinds if each.kernels)
            say(
                f"{row.name}: {row.step_ms.median:.1f} ms a step; {row.profile.step_ms:.1f} profiled, "
                f"of which kernels run {busy:.1f} (the HLO of {row.profile.known:.0%} of that is known)"
            )
    for name, found in list(profiles.items())[:1]:
        say(f"{name}, where a step goes:")
        show_profile(found)
    if len(profiles) > 1:
        times = [{each.kind: each.ms for each in found.kinds} for found in profiles.values()]
        kinds = dict.fromkeys(kind for each in times for kind in each)
        cells = [(kind, *(f"{each.get(kind, 0):.2f}" for each in times)) for kind in kinds]
        stderr.print(Table(("ms/step", *profiles), tuple(cells)).terminal())


def show_profile(found: StepProfile) -> None:
    """Print kinds, kernels and functions, with the rates that they are compared with."""
    stderr.print(table(KINDS, found.kinds).terminal())
    stderr.print(table(KERNELS, found.kernels).terminal())
    stderr.print(table(SOURCES, found.sources).terminal())
    products = [f"{rate:.3g} TFLOP/s in {dtype}" for dtype, rate in found.product_tflops.items()]
    copies = "unknown" if found.memory_gb_s is None else f"{found.memory_gb_s:,.0f} GB/s"
    say(f"a plain product reaches {', '.join(products) or 'unknown'}; a plain copy reads and writes {copies}")
