"""Other programs that generate with the same model, each at its best settings, one file a peer.

    jaxgpt-bench generate --preset gpt2 --peers
    jaxgpt-bench generate --preset gpt2 --peer onnxruntime llama.cpp

Each takes the float32 artifact and is converted to what it loads before anything is timed; what a row's
precision means for it, what was tried and what was fastest stands in its file.
"""

from jaxgpt_bench.peers.ctranslate2_ import CTranslate2
from jaxgpt_bench.peers.llama_cpp_ import LlamaCpp
from jaxgpt_bench.peers.onnx_runtime import OnnxRuntime
from jaxgpt_bench.peers.openvino_ import OpenVino
from jaxgpt_bench.peers.peer import Peer
from jaxgpt_bench.peers.torch_dynamic import TorchQuantizeDynamic
from jaxgpt_bench.peers.transformers_ import Transformers

_ALL: tuple[Peer, ...] = (
    Transformers(),
    TorchQuantizeDynamic(),
    CTranslate2(),
    OnnxRuntime(),
    OpenVino(),
    LlamaCpp(),
)
PEERS: dict[str, Peer] = {peer.engine: peer for peer in _ALL}
