"""OpenVINO, with a graph built operator by operator: its cache is a variable, weights stay compressed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxgpt_bench.peers.blocks import block_size_for, round_blocks
from jaxgpt_bench.peers.peer import (
    PLAIN,
    Artifact,
    Peer,
    Prepared,
    Variant,
    chosen,
    fastest,
    head_weight,
    weight_bytes,
)

INT4_BLOCK = 128
GROUPS = (0, 32, 128)
SETTING = "dynamic_quantization_group_size"


def build(artifact: Artifact, precision: str) -> Any:
    """Return the model: tokens (1, T), positions (1, T), beams (1) -> logits of the last position (1, 1, V).

    Keys and values are concatenated to variables, in the form that the CPU plugin takes for a cache of
    its own; compressed weights are integers -> float -> times a scale, which it multiplies as integers.
    """
    import openvino as ov
    from jaxgpt_export.model.gpt import LAYER_NORM_EPSILON
    from openvino import opset13 as op

    config = artifact.config
    H, D = config.n_head, config.n_embd // config.n_head
    arrays = {name: tensor.numpy() for name, tensor in artifact.tensors.items()}
    tokens = op.parameter([-1, -1], ov.Type.i64, name="tokens")
    positions = op.parameter([-1, -1], ov.Type.i64, name="positions")
    beams = op.parameter([-1], ov.Type.i32, name="beams")
    for node, name in ((tokens, "tokens"), (positions, "positions"), (beams, "beams")):
        node.output(0).set_names({name})
    zero = op.constant(0, ov.Type.i64)
    sinks: list[Any] = []

    def linear(name: str, x: Any, weight: Any, bias: Any = None) -> Any:
        product = op.matmul(x, compressed(weight, precision), False, True)
        return product if bias is None else op.add(product, op.constant(bias[None, None]))

    def norm(name: str, x: Any) -> Any:
        axes = op.constant(np.array([-1], np.int64))
        plain = op.mvn(x, axes, True, LAYER_NORM_EPSILON, "INSIDE_SQRT")
        scaled = op.multiply(plain, op.constant(arrays[f"{name}.weight"][None, None]))
        return op.add(scaled, op.constant(arrays[f"{name}.bias"][None, None]))

    def layer(name: str, x: Any) -> Any:
        return linear(name, x, arrays[f"{name}.weight"], arrays[f"{name}.bias"])

    batch = op.gather(op.shape_of(tokens), op.constant(np.array([0], np.int64)), zero)
    shape = op.concat([batch, *(op.constant(np.array([n], np.int64)) for n in (H, 0, D))], 0)
    empty = op.broadcast(op.constant(np.float32(0)), shape)

    def remember(name: str, new: Any) -> Any:
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape([-1, H, -1, D]), ov.Type.f32, name
        variable = ov.op.util.Variable(info)
        past = op.gather(op.read_value(empty, variable), beams, zero)
        whole = op.concat([past, new], 2)
        sinks.append(op.assign(whole, variable))
        return whole

    def attention(name: str, x: Any) -> Any:
        qkv = layer(f"{name}.c_attn", x)
        parts = op.split(qkv, op.constant(2, ov.Type.i64), 3)
        heads = []
        for part in range(3):
            split = op.reshape(parts.output(part), op.constant(np.array([0, 0, H, D], np.int64)), True)
            heads.append(op.transpose(split, op.constant(np.array([0, 2, 1, 3], np.int64))))
        q, k, v = heads
        k, v = remember(f"{name}.key", k), remember(f"{name}.value", v)
        mixed = op.scaled_dot_product_attention(q, k, v, mask, causal=False)
        joined = op.transpose(mixed, op.constant(np.array([0, 2, 1, 3], np.int64)))
        return layer(
            f"{name}.c_proj", op.reshape(joined, op.constant(np.array([0, 0, H * D], np.int64)), True)
        )

    word = op.gather(op.constant(arrays["wte.weight"]), tokens, zero)
    x = op.add(word, op.gather(op.constant(arrays["wpe.weight"]), positions, zero))
    # A position sees those up to its own: (1, 1, T, whole length), 0 or lowest.
    own = op.unsqueeze(positions, op.constant(np.array([1, 3], np.int64)))
    length = op.add(
        op.reduce_max(positions, op.constant(np.array([0, 1], np.int64))), op.constant(1, ov.Type.i64)
    )
    every = op.range(zero, length, op.constant(1, ov.Type.i64), "i64")
    seen = op.less_equal(op.unsqueeze(every, op.constant(np.array([0, 1, 2], np.int64))), own)
    mask = op.select(seen, op.constant(np.float32(0)), op.constant(np.float32(np.finfo(np.float32).min)))
    for index in range(config.n_layer):
        at = f"h.{index}"
        x = op.add(x, attention(f"{at}.attn", norm(f"{at}.ln_1", x)))
        wide = op.gelu(layer(f"{at}.mlp.c_fc", norm(f"{at}.ln_2", x)), "tanh")
        x = op.add(x, layer(f"{at}.mlp.c_proj", wide))
    last = op.gather(norm("ln_f", x), op.constant(np.array([-1], np.int64)), op.constant(1, ov.Type.i64))
    logits = linear("head", last, head_weight(artifact).numpy())
    return ov.Model([op.result(logits)], sinks, [tokens, positions, beams], "gpt2")


def compressed(weight: Any, precision: str) -> Any:
    """Return a matrix (O, I) as the node that gives it."""
    import openvino as ov
    from openvino import opset13 as op

    if precision == "fp32":
        return op.constant(weight)
    if precision == "int8-weight-only":
        scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
        integers = op.constant(np.rint(weight / scale).astype(np.int8))
        return op.multiply(op.convert(integers, "f32"), op.constant(scale.astype(np.float32)))
    q, scales = round_blocks(weight, block_size_for(weight.shape[1], INT4_BLOCK), 4)
    packed, eight = _pack(q), np.full(1, 8, np.uint8)  # tensors are views of them until they are copied
    integers = op.constant(ov.Tensor(packed, list(q.shape), ov.Type.u4), shared_memory=False)
    middle = op.constant(ov.Tensor(eight, [1, 1, 1], ov.Type.u4), shared_memory=False)
    centred = op.subtract(op.convert(integers, "f32"), op.convert(middle, "f32"))
    whole = op.multiply(centred, op.constant(scales[..., None]))
    return op.reshape(whole, op.constant(np.array(weight.shape, np.int64)), False)


def _pack(q: Any) -> Any:
    """Put pairs of the flat order into bytes, the first into the lower half."""
    flat = q.reshape(-1)
    return np.ascontiguousarray(flat[::2] | (flat[1::2] << 4))


class OpenVinoSession:
    """A compiled model and one request, whose variables are the cache."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(path / "model.xml")
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        self.block_size = int((path / "context").read_text(encoding="utf-8"))
        self._length = 0
        self._beams = np.zeros(1, np.int32)

    def prefill(self, tokens: Sequence[int]) -> Any:
        """Take a prompt; return the logits (V,) after it."""
        self._request.reset_state()
        self._length = 0
        return self._take(tokens)

    def decode(self, token: int) -> Any:
        """Take one more token; return the logits (V,) after it."""
        return self._take([token])

    def _take(self, tokens: Sequence[int]) -> Any:
        count = len(tokens)
        positions = np.arange(self._length, self._length + count, dtype=np.int64)[None]
        self._length += count
        given = {"tokens": np.array([tokens], np.int64), "positions": positions, "beams": self._beams}
        out = self._request.infer(given, share_inputs=True, share_outputs=True)
        return out[0][0, 0]


def settings(threads: int, group: int) -> dict[str, Any]:
    """Return the settings; `group` inputs share a scale when they are rounded, 0 rounds none."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        SETTING.upper(): group,
    }


class OpenVino(Peer):
    """OpenVINO's CPU plugin."""

    engine: ClassVar[str] = "openvino"
    modules: ClassVar[tuple[str, ...]] = ("openvino",)
    install: ClassVar[str] = "openvino"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8-weight-only", "int4-weight-only")

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Write the graph and its weights."""
        import openvino as ov

        ov.save_model(build(artifact, precision), scratch / "model.xml", compress_to_fp16=False)
        (scratch / "context").write_text(str(artifact.config.block_size), encoding="utf-8")

        found = {}
        if precision != "fp32":
            trial = {group: OpenVinoSession(scratch, settings(threads, group)) for group in GROUPS}
            found = fastest(trial, scratch, SETTING)

        def matrix_bytes(matrix: Any) -> float:
            O, I = matrix.shape
            if precision == "int4-weight-only":
                return O * I / 2 + 4.0 * O * I / block_size_for(I, INT4_BLOCK)
            return 4.0 * O * I if precision == "fp32" else O * I + 4.0 * O

        return Prepared(scratch, weight_bytes(artifact, matrix_bytes), found)

    def open(self, path: Path, precision: str, threads: int, variant: Variant = PLAIN) -> OpenVinoSession:
        """Compile the model."""
        return OpenVinoSession(path, settings(threads, chosen(path, SETTING, 0)))


PEER = OpenVino()
