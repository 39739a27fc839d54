"""ONNX Runtime, with a graph of about a hundred nodes written by hand.

Keys and values lie in one buffer a layer that the graph writes into (IO binding). 8 and 4 bits alone
are MatMulNBits with blocks of 128 and inputs rounded inside it (accuracy level 4), the head too;
int8-dynamic is DynamicQuantizeMatMul with a scale a row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxgpt.shared.config import ModelConfig
from jaxgpt_bench.peers.blocks import block_size_for, pack_pairs, round_blocks
from jaxgpt_bench.peers.peer import (
    PLAIN,
    Artifact,
    Floats,
    Peer,
    Prepared,
    Variant,
    arrays,
    chosen,
    fastest,
    head_weight,
    weight_bytes,
)

BITS = {"int8-weight-only": 8, "int4-weight-only": 4}
BLOCK = 128
CONTRIB = "com.microsoft"
OPSET = 20
SETTING = "spinning"


class Graph:
    """A graph that grows node by node."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, array: Any) -> str:
        """Add a constant; return its name."""
        import onnx

        self.weights.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """Add a node, of the contrib operators where ONNX has none of its own; return its first output."""
        import onnx

        domain = "" if onnx.defs.has(kind) else CONTRIB
        self.nodes.append(onnx.helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]


def build(artifact: Artifact, precision: str) -> Any:
    """Return the model: tokens (1, T), positions (1, T), a cache -> logits of the last position (1, 1, V).

    A block is SkipLayerNormalization (which adds the residual and the last bias too), qkv,
    GroupQueryAttention, output, SkipLayerNormalization, fc, FastGelu (with its bias), output.
    """
    import onnx

    from jaxgpt.shared.architecture import LAYER_NORM_EPSILON

    config, graph, weights = artifact.config, Graph(), arrays(artifact)
    for name in ("wte", "wpe"):
        graph.weight(name, weights[f"{name}.weight"])
    word = graph.node("Gather", ["wte", "tokens"], ["word"])
    place = graph.node("Gather", ["wpe", "positions"], ["place"])
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
        qkv = linear(graph, precision, f"{at}.attn.c_attn", normed, weights, bias=True)
        cache = [f"{part}.{layer}" for part in ("key", "value")]
        mixed = graph.node(
            "GroupQueryAttention",
            [qkv, "", "", *cache, "last", "length"],
            [f"{at}.mixed", *(f"{name}.new" for name in cache)],
            num_heads=config.n_head,
            kv_num_heads=config.n_head,
            do_rotary=0,
        )
        out = linear(graph, precision, f"{at}.attn.c_proj", mixed, weights)
        normed, stream = _skip(graph, weights, out, stream, f"{at}.attn.c_proj", f"{at}.ln_2")
        wide = linear(graph, precision, f"{at}.mlp.c_fc", normed, weights)
        bias = graph.weight(f"{at}.mlp.c_fc.bias", weights[f"{at}.mlp.c_fc.bias"])
        active = graph.node("FastGelu", [wide, bias], [f"{at}.active"])
        out = linear(graph, precision, f"{at}.mlp.c_proj", active, weights)
        normed, stream = _skip(graph, weights, out, stream, f"{at}.mlp.c_proj", following)
    graph.weight("one", np.array([-1], np.int64))
    final = graph.node("Gather", [normed, "one"], ["final"], axis=1)
    weights["head.weight"] = head_weight(artifact)
    linear(graph, precision, "head", final, weights)
    return onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "gpt2", *_interface(config), graph.weights),
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(CONTRIB, 1)],
        ir_version=10,
    )


def _interface(config: ModelConfig) -> tuple[list[Any], list[Any]]:
    import onnx

    info, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    shape = [1, config.n_head, config.block_size, config.n_embd // config.n_head]
    caches = [f"{part}.{layer}" for layer in range(config.n_layer) for part in ("key", "value")]
    inputs = [
        info("tokens", kinds.INT64, [1, "T"]),
        info("positions", kinds.INT64, [1, "T"]),
        info("last", kinds.INT32, [1]),
        info("length", kinds.INT32, [1]),
        *(info(name, kinds.FLOAT, shape) for name in caches),
    ]
    outputs = [
        info("head", kinds.FLOAT, [1, 1, config.vocab_size]),
        *(info(f"{name}.new", kinds.FLOAT, shape) for name in caches),
    ]
    return inputs, outputs


def _pair(graph: Graph, weights: dict[str, Floats], name: str) -> list[str]:
    return [graph.weight(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias")]


def _skip(
    graph: Graph, weights: dict[str, Floats], out: str, stream: str, layer: str, norm: str
) -> tuple[str, str]:
    """Add a layer's output and bias to the stream and normalize; return both."""
    from jaxgpt.shared.architecture import LAYER_NORM_EPSILON

    bias = graph.weight(f"{layer}.bias", weights[f"{layer}.bias"])
    names = [f"{norm}.out", "", "", f"{norm}.stream"]
    inputs = [out, stream, *_pair(graph, weights, norm), bias]
    normed = graph.node("SkipLayerNormalization", inputs, names, epsilon=LAYER_NORM_EPSILON)
    return normed, names[3]


def linear(
    graph: Graph, precision: str, name: str, x: str, weights: dict[str, Floats], bias: bool = False
) -> str:
    """Add the product with a layer's matrix, and its bias where nothing later adds that."""
    weight = weights[f"{name}.weight"]
    O, I = weight.shape
    biases = [graph.weight(f"{name}.bias", weights[f"{name}.bias"])] if bias else []
    if precision == "fp32":
        transposed = graph.weight(f"{name}.weight", weight.T)
        product = f"{name}.product" if bias else name
        graph.node("MatMul", [x, transposed], [product])
        return graph.node("Add", [product, *biases], [name]) if bias else name
    if precision == "int8-dynamic":
        scale = np.maximum(np.abs(weight).max(axis=1) / 127, np.finfo(np.float32).tiny)
        q = graph.weight(f"{name}.q", np.rint(weight.T / scale).astype(np.int8))
        scales = graph.weight(f"{name}.scale", scale.astype(np.float32))
        zero = graph.weight(f"{name}.zero", np.zeros(O, np.int8))
        return graph.node("DynamicQuantizeMatMul", [x, q, scales, zero, *biases], [name])
    bits, block = BITS[precision], block_size_for(I, BLOCK)
    integers, scale = round_blocks(weight, block, bits)
    packed = graph.weight(f"{name}.q", pack_pairs(integers) if bits == 4 else integers)
    scales = graph.weight(f"{name}.scale", scale)
    inputs = [x, packed, scales, *(["", ""] if bias else []), *biases]
    shape = {"K": I, "N": O, "bits": bits, "block_size": block, "accuracy_level": 4}
    return graph.node("MatMulNBits", inputs, [name], **shape)


class OnnxSession:
    """A session whose cache and inputs stay in place: the graph writes each new key and value into them."""

    def __init__(self, path: Path, options: Any) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self.block_size = int(shapes["key.0"][2])
        self._cache = {
            name: np.zeros(shape, np.float32)
            for name, shape in shapes.items()
            if name.startswith(("key.", "value."))
        }
        self._logits = np.zeros(self._session.get_outputs()[0].shape, np.float32)
        self._last, self._total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._one = self._binding(1)
        self._length = 0

    def _binding(self, count: int) -> tuple[Any, Any, Any]:
        """Bind buffers for so many tokens at once."""
        tokens, positions = np.zeros((1, count), np.int64), np.zeros((1, count), np.int64)
        binding = self._session.io_binding()
        given: dict[str, Any] = {
            "tokens": tokens,
            "positions": positions,
            "last": self._last,
            "length": self._total,
        }
        for name, array in {**given, **self._cache}.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        made: dict[str, Any] = {"head": self._logits} | {
            f"{name}.new": array for name, array in self._cache.items()
        }
        for name, array in made.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding, tokens, positions

    def prefill(self, tokens: Sequence[int]) -> Any:
        """Take a prompt; return the logits (V,) after it."""
        self._length = 0
        return self._take(tokens, self._binding(len(tokens)))

    def decode(self, token: int) -> Any:
        """Take one more token; return the logits (V,) after it."""
        return self._take([token], self._one)

    def _take(self, tokens: Sequence[int], bound: tuple[Any, Any, Any]) -> Any:
        binding, inputs, positions = bound
        inputs[0] = tokens
        positions[0] = range(self._length, self._length + len(tokens))
        self._length += len(tokens)
        self._last[0], self._total[0] = self._length - 1, self._length
        self._session.run_with_iobinding(binding)
        return self._logits[0, 0]


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
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8-dynamic", *BITS)

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Write the graph, its weights beside it."""
        import onnx

        model = build(artifact, precision)
        onnx.save(model, scratch / "model.onnx", save_as_external_data=True, location="weights")

        def matrix_bytes(matrix: Any) -> float:
            O, I = matrix.shape
            if precision in BITS:
                block = block_size_for(I, BLOCK)
                return float(O * I * BITS[precision] / 8 + 4 * O * I / block)
            return float(4 * O * I if precision == "fp32" else O * I + 4 * O)

        trial = {spinning: self._open(scratch, threads, spinning) for spinning in (False, True)}
        return Prepared(scratch, weight_bytes(artifact, matrix_bytes), fastest(trial, scratch, SETTING))

    def _open(self, path: Path, threads: int, spinning: bool) -> OnnxSession:
        return OnnxSession(path / "model.onnx", session_options(threads, spinning))

    def open(self, path: Path, precision: str, threads: int, variant: Variant = PLAIN) -> OnnxSession:
        """Open a session."""
        return self._open(path, threads, chosen(path, SETTING, True))


PEER = OnnxRuntime()
