"""A fresh process that loads an artifact into the engine and generates 250 tokens; writes what it took.

python -m jaxgpt_bench.speed.load_process ARTIFACT THREADS
"""

import json
import sys
import time
from pathlib import Path

from jaxgpt_export.format.artifact import read_certified_artifact
from jaxgpt_export.native.native_model import NativeModel
from jaxgpt_export.native.native_session import NativeSession

from jaxgpt_bench.common.workers import peak_rss_bytes

TOKENS = 250


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM now (VmRSS of Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def main(folder: Path, threads: int) -> dict[str, float]:
    """Return seconds to the first token; bytes then, after the last and at the peak, libraries left out."""
    import tiktoken  # noqa: F401  a library, whose bytes are not the model's

    before, started = resident_bytes(), time.perf_counter()
    artifact = read_certified_artifact(folder)
    tokenizer = artifact.tokenizer()
    session = NativeSession(NativeModel(artifact, threads))
    artifact.tensors.clear()
    token = int(session.greedy([tokenizer.endoftext])[0])
    seconds, first = time.perf_counter() - started, resident_bytes() - before
    for _ in range(min(TOKENS, session.block_size - 1)):
        token = int(session.greedy([token])[0])
    grown, peak = resident_bytes() - before, peak_rss_bytes() - before
    return {"seconds": seconds, "first": first, "grown": grown, "peak": peak}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))) + "\n")
