"""A process that opens one program and leaves the logits of texts in files, one call a line.

    python -m jaxgpt_bench.quality.program_process '{"engine": "onnxruntime", "precision": "fp32", ...}'

is what `jaxgpt-bench quality --peers` starts (see common/workers.py): libraries that do not mix, such as two
OpenMP runtimes, never meet.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt_bench.common.workers import serve
from jaxgpt_bench.peers.peer import Variant
from jaxgpt_bench.speed.programs import find_programs


def prepare(order: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Open what `Contestant.order` says; return what answers {"texts": [[...], ...], "out": FILE}."""
    program, variant = find_programs()[order["engine"]], Variant(**order["variant"])
    path, settings = Path(order["path"]), order["settings"]
    session = program.open(path, order["precision"], order["threads"], variant, settings)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        """Write the logits (texts, T, V), float32, as a .npy file."""
        np.save(question["out"], np.stack([program.text_logits(session, text) for text in question["texts"]]))
        return {}

    return answer


if __name__ == "__main__":
    serve(prepare)
