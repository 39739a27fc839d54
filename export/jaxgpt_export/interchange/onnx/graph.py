"""The graph: what ONNX Runtime computes of a GPT-2, node by node, and the two files that hold it.

    model.onnx        nodes, inputs and outputs
    model.onnx.data   weights (external data: a protobuf ends at 2 GB), written one after another

A block is SkipLayerNormalization (which adds the residual and the last bias too), qkv, GroupQueryAttention,
output, SkipLayerNormalization, fc, FastGelu (with its bias), output: 8 nodes. 8 and 4 bits alone are
MatMulNBits with blocks of up to 128 and inputs rounded inside it (accuracy level 4), the head too;
int8-dynamic is DynamicQuantizeMatMul with a scale a row. Embeddings, norms and biases stay float32.

Keys and values lie in a buffer a layer, outside: the graph reads `past_key_values.N.key` and writes
`present.N.key`. Bound to the same memory (IO binding), only the new tokens' are written.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from jaxgpt.shared.architecture import HEAD, LAYER_NORM_EPSILON, linear_layers
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.tensor_file import Array, Arrays

from jaxgpt_export.interchange.blocks import block_size_for, pack_pairs, round_blocks
from jaxgpt_export.interchange.onnx.precision import BITS, Precision
from jaxgpt_export.interchange.onnx.rounding import round_rows

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
CONTRIB = "com.microsoft"
OPSET = 20
IR_VERSION = 10
ALIGNMENT = 64  # of a weight in the file: a line of a cache
INLINE_BYTES = 1024  # smaller ones stand in model.onnx

# What goes in and out, for the model's metadata and the folder's README.
INTERFACE = {
    "input_ids": "int64 (1, T): the new tokens, T from 1 on",
    "position_ids": "int64 (1, T): their positions, from 0 on; those before lie in the cache",
    "seqlens_k": "int32 (1,): position of the last new token",
    "total_sequence_length": "int32 (1,): seqlens_k + 1, at most S",
    "past_key_values.N.key, .value": "float32 (1, H, S, D): the cache of layer N, zeros at first",
    "logits": "float32 (1, 1, V): of the token after the last new one",
    "present.N.key, .value": "float32 (1, H, S, D): the cache with the new tokens; may be the same memory",
}


class Graph:
    """A graph that grows node by node; large weights go to a file at once.

    Args:
      data: the file, open for writing.
    """

    def __init__(self, data: BinaryIO) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._data = data

    def weight(self, name: str, array: Array) -> str:
        """Add a constant; return its name."""
        import onnx

        array = np.ascontiguousarray(array)
        if array.nbytes < INLINE_BYTES:
            self.weights.append(onnx.numpy_helper.from_array(array, name))
            return name
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        self._data.write(bytes(-self._data.tell() % ALIGNMENT))
        place = {"location": DATA_FILE, "offset": self._data.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(array.data)
        self.weights.append(tensor)
        return name

    def node(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """Add a node, of the contrib operators where ONNX has none of its own; return its first output."""
        import onnx

        domain = "" if onnx.defs.has(kind) else CONTRIB
        self.nodes.append(onnx.helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]


def write_graph(
    folder: Path, config: ModelConfig, tensors: Arrays, precision: Precision, about: Mapping[str, str]
) -> None:
    """Write model.onnx and model.onnx.data.

    Args:
      folder: exists.
      config: shape, with learned positions.
      tensors: float32, by module name, matrices (O, I).
      precision: of the matrices.
      about: more for the model's metadata.
    """
    import onnx

    with (folder / DATA_FILE).open("wb") as data:
        graph = Graph(data)
        _add_model(graph, config, tensors, precision)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "gpt2", *_interface(config), graph.weights),
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(CONTRIB, 1)],
        ir_version=IR_VERSION,
        producer_name="jaxgpt",
    )
    onnx.helper.set_model_props(model, {**about, "precision": precision, **INTERFACE})
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())


def model_bytes(folder: Path) -> int:
    """Return the size of a model's two files."""
    return sum((folder / name).stat().st_size for name in (MODEL_FILE, DATA_FILE))


def _add_model(graph: Graph, config: ModelConfig, weights: Arrays, precision: Precision) -> None:
    """Add every node: tokens and positions (1, T), a cache -> logits of the last position (1, 1, V)."""
    for name in ("wte", "wpe"):
        graph.weight(name, weights[f"{name}.weight"])
    word = graph.node("Gather", ["wte", "input_ids"], ["word"])
    place = graph.node("Gather", ["wpe", "position_ids"], ["place"])
    stream = graph.node("Add", [word, place], ["stream"])
    normed = graph.node(
        "LayerNormalization",
        [stream, *_pair(graph, weights, "h.0.ln_1")],
        ["normed"],
        epsilon=LAYER_NORM_EPSILON,
    )
    for layer in range(config.n_layer):
        at = f"h.{layer}"
        following = f"h.{layer + 1}.ln_1" if layer + 1 < config.n_layer else "ln_f"
        qkv = _linear(graph, precision, f"{at}.attn.c_attn", normed, weights, bias=True)
        mixed = graph.node(
            "GroupQueryAttention",
            [qkv, "", "", *_cache("past_key_values", layer), "seqlens_k", "total_sequence_length"],
            [f"{at}.mixed", *_cache("present", layer)],
            num_heads=config.n_head,
            kv_num_heads=config.n_head,
            do_rotary=0,
        )
        out = _linear(graph, precision, f"{at}.attn.c_proj", mixed, weights)
        normed, stream = _skip(graph, weights, out, stream, f"{at}.attn.c_proj", f"{at}.ln_2")
        wide = _linear(graph, precision, f"{at}.mlp.c_fc", normed, weights)
        bias = graph.weight(f"{at}.mlp.c_fc.bias", weights[f"{at}.mlp.c_fc.bias"])
        active = graph.node("FastGelu", [wide, bias], [f"{at}.active"])
        out = _linear(graph, precision, f"{at}.mlp.c_proj", active, weights)
        normed, stream = _skip(graph, weights, out, stream, f"{at}.mlp.c_proj", following)
    graph.weight("last", np.array([-1], np.int64))
    final = graph.node("Gather", [normed, "last"], ["final"], axis=1)
    matrix = weights[f"{linear_layers(config)[HEAD].matrix}.weight"]
    product(graph, precision, HEAD, final, matrix, "logits")


def _cache(which: str, layer: int) -> list[str]:
    return [f"{which}.{layer}.{part}" for part in ("key", "value")]


def _interface(config: ModelConfig) -> tuple[list[Any], list[Any]]:
    import onnx

    kinds = onnx.TensorProto
    cache = [1, config.n_head, config.block_size, config.n_embd // config.n_head]

    def info(name: str, kind: int, shape: Sequence[int | str]) -> Any:
        return onnx.helper.make_tensor_value_info(name, kind, shape, INTERFACE.get(name, ""))

    def caches(which: str) -> list[Any]:
        return [
            info(name, kinds.FLOAT, cache) for layer in range(config.n_layer) for name in _cache(which, layer)
        ]

    inputs = [
        info("input_ids", kinds.INT64, [1, "T"]),
        info("position_ids", kinds.INT64, [1, "T"]),
        info("seqlens_k", kinds.INT32, [1]),
        info("total_sequence_length", kinds.INT32, [1]),
        *caches("past_key_values"),
    ]
    return inputs, [info("logits", kinds.FLOAT, [1, 1, config.vocab_size]), *caches("present")]


def _pair(graph: Graph, weights: Arrays, name: str) -> list[str]:
    return [graph.weight(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias")]


def _skip(graph: Graph, weights: Arrays, out: str, stream: str, layer: str, norm: str) -> tuple[str, str]:
    """Add a layer's output and bias to the stream and normalize; return both."""
    bias = graph.weight(f"{layer}.bias", weights[f"{layer}.bias"])
    names = [f"{norm}.out", "", "", f"{norm}.stream"]
    inputs = [out, stream, *_pair(graph, weights, norm), bias]
    normed = graph.node("SkipLayerNormalization", inputs, names, epsilon=LAYER_NORM_EPSILON)
    return normed, names[3]


def _linear(
    graph: Graph, precision: Precision, name: str, x: str, weights: Arrays, bias: bool = False
) -> str:
    """Add the product with a layer's matrix, and its bias where nothing later adds that."""
    added = weights[f"{name}.bias"] if bias else None
    return product(graph, precision, name, x, weights[f"{name}.weight"], name, added)


def product(
    graph: Graph,
    precision: Precision,
    name: str,
    x: str,
    weight: npt.NDArray[np.float32],
    output: str,
    bias: npt.NDArray[np.float32] | None = None,
) -> str:
    """Add x W^T + b; return the output.

    Args:
      graph: to which it is added.
      precision: of the matrix.
      name: of the layer, by which its constants are called.
      x: of the input.
      weight: (O, I).
      output: its name.
      bias: (O,).
    """
    O, I = weight.shape
    biases = [] if bias is None else [graph.weight(f"{name}.bias", bias)]
    if precision == "float32":
        transposed = graph.weight(f"{name}.weight", weight.T)
        multiplied = f"{output}.product" if biases else output
        graph.node("MatMul", [x, transposed], [multiplied])
        return graph.node("Add", [multiplied, *biases], [output]) if biases else output
    if precision == "int8-dynamic":
        rows, scale = round_rows(weight)
        q = graph.weight(f"{name}.q", rows.T)
        scales = graph.weight(f"{name}.scale", scale)
        zero = graph.weight(f"{name}.zero", np.zeros(O, np.int8))
        return graph.node("DynamicQuantizeMatMul", [x, q, scales, zero, *biases], [output])
    bits, block = BITS[precision], block_size_for(I)
    integers, scale = round_blocks(weight, block, bits)
    packed = graph.weight(f"{name}.q", pack_pairs(integers) if bits == 4 else integers)
    scales = graph.weight(f"{name}.scale", scale)
    inputs = [x, packed, scales, *(["", ""] if biases else []), *biases]
    shape = {"K": I, "N": O, "bits": bits, "block_size": block, "accuracy_level": 4}
    return graph.node("MatMulNBits", inputs, [output], **shape)
