"""ONNX Runtime, with the graph of about a hundred nodes that `jaxgpt-export onnx` writes."""

from pathlib import Path
from typing import Any, ClassVar

from jaxgpt_export.interchange.blocks import block_size_for
from jaxgpt_export.interchange.onnx.graph import write_graph
from jaxgpt_export.interchange.onnx.precision import BITS, Precision
from jaxgpt_export.interchange.onnx.session import OnnxSession

from jaxgpt_bench.peers.peer import (
    NO_SETTINGS,
    PLAIN,
    Artifact,
    Peer,
    Prepared,
    Settings,
    Variant,
    arrays,
    weight_bytes,
)

PRECISIONS: dict[str, Precision] = {
    "fp32": "float32",
    "int8-dynamic": "int8-dynamic",
    "int8-weight-only": "int8-weight-only",
    "int4-weight-only": "int4-weight-only",
}
SETTING = "spinning"


def session_options(threads: int, spinning: bool) -> Any:
    """Return a session's settings."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    return options


class OnnxRuntime(Peer):
    """ONNX Runtime."""

    engine: ClassVar[str] = "onnxruntime"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    install: ClassVar[str] = "onnx onnxruntime"
    precisions: ClassVar[tuple[str, ...]] = tuple(PRECISIONS)

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Write the graph, its weights beside it."""
        write_graph(scratch, artifact.config, arrays(artifact), PRECISIONS[precision], {})

        def matrix_bytes(matrix: Any) -> float:
            O, I = matrix.shape
            if precision in BITS:
                block = block_size_for(I)
                return float(O * I * BITS[precision] / 8 + 4 * O * I / block)
            return float(4 * O * I if precision == "fp32" else O * I + 4 * O)

        return Prepared(scratch, weight_bytes(artifact, matrix_bytes))

    def settings_tried(self, precision: str) -> tuple[Settings, ...]:
        """Let its threads spin between two operators, or sleep."""
        return tuple({SETTING: spinning} for spinning in (True, False))

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> OnnxSession:
        """Open a session."""
        return OnnxSession(path, session_options(threads, settings.get(SETTING, True)))


PEER = OnnxRuntime()
