"""A process that opens one contestant and generates with it once for every line.

    python -m jaxgpt_bench.speed.contestant_process '{"engine": "jaxgpt-torch", "precision": "fp32", ...}'

is what the bench starts (see common/workers.py). It imports what its program needs and nothing else: the peak
of memory is that program's own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt_bench.common.timing import timed_generation
from jaxgpt_bench.common.workers import serve
from jaxgpt_bench.peers.peer import Variant
from jaxgpt_bench.speed.programs import find_programs


def prepare(order: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Open what `Contestant.order` says; return what answers {"prompt": [...], "count": N}."""
    program, variant = find_programs()[order["engine"]], Variant(**order["variant"])
    session = program.open(
        Path(order["path"]), order["precision"], order["threads"], variant, order["settings"]
    )
    return lambda question: timed_generation(session, question["prompt"], question["count"])


if __name__ == "__main__":
    serve(prepare)
