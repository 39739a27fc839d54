"""A process that converts for one peer: a crash in it ends no measurement, and nothing stays loaded.

    python -m jaxgpt_bench.peers.conversion '{"engine": "onnxruntime", "artifact": "..."}'

is what the bench starts (see common/workers.py); each question is a precision, a folder and the threads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt_bench.common.workers import serve
from jaxgpt_bench.peers import find_peers


def prepare(order: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Read the artifact; return what answers {"precision": ..., "scratch": ..., "threads": N}."""
    from jaxgpt_export.format.artifact import read_artifact

    peer, artifact = find_peers()[order["engine"]], read_artifact(Path(order["artifact"]))

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        scratch = Path(question["scratch"])
        try:
            made = peer.convert(artifact, question["precision"], scratch, question["threads"])
        except Exception as error:  # whatever a library may raise: the others are still measured
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        return {
            "path": str(made.path),
            "bytes_per_token": made.bytes_per_token,
            "file_bytes": made.file_bytes,
        }

    return answer


if __name__ == "__main__":
    serve(prepare)
