"""When a machine was too busy for its figures to be passed on, and what then happens.

A command that measures says so in a line and writes its JSON file in any case. Tables of README and docs/ are
not written from such figures unless somebody accepts them, which the JSON file then records.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt_bench.common.rows import Noise

# Of the cores' time. The kernel's counts of all processes and of the cores agree within 0.3 % over 5 s:
# 5 % are a process. Threads that wait for each other lose more than it takes.
OTHERS_CPU_SHARE = 0.05
# The same loss, which no process of this system shows. A virtual machine lost 0.06 % over a day, and up to
# 1.9 % in a minute with all its cores busy.
STOLEN_SHARE = 0.02
# (largest - least) / median. In the committed results the rounds of a quiet machine lie 4 % apart, those of
# shared ones 75 and 94 %.
PROBE_SPREAD = 0.15


def reasons(noise: Noise | None) -> list[str]:
    """Say in what a machine was not quiet; nothing where it was, or where that is not known."""
    if noise is None:
        return []
    found = (
        ("other processes used {} of the cores", noise.others_cpu_share, OTHERS_CPU_SHARE),
        ("the host took {} of them", noise.stolen_share, STOLEN_SHARE),
        ("the measured ceiling varied by {} between rounds", noise.probe_spread, PROBE_SPREAD),
    )
    return [
        f"{text.format(f'{value:.0%}')} (limit {limit:.0%})"
        for text, value, limit in found
        if value is not None and value > limit
    ]


def warn(noise: Noise | None) -> None:
    """Say in one line on stderr that the machine was busy; nothing where it was quiet."""
    if found := reasons(noise):
        say(f"the machine was not quiet: {'; '.join(found)}; measure again when it is")


def is_refused(noise: Noise | None) -> bool:
    """Whether tables are not to be written from such figures."""
    return noise is not None and not noise.accepted and bool(reasons(noise))


def accepted(noise: Noise | None) -> Noise | None:
    """Return it as one that somebody accepts."""
    return None if noise is None else dataclasses.replace(noise, accepted=True)


def refuse(what: str, noises: Mapping[str, Noise | None]) -> None:
    """Raise UserError where one was busy.

    Args:
      what: that is not written.
      noises: by the name of what was measured.
    """
    for name, noise in noises.items():
        if is_refused(noise):
            raise UserError(
                f"{what} can't be written: while {name} was measured, {'; '.join(reasons(noise))}; measure "
                "again when the machine is quiet, or give --accept-noise"
            )


def noises_in(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the JSON objects of noise that a file holds: its own, and those of speeds in a report."""
    speeds = figures.get("speed")
    parts = [figures, *(speeds if isinstance(speeds, list) else [speeds])]
    return [part["noise"] for part in parts if isinstance(part, Mapping) and part.get("noise")]
