"""OpenVINO, with a graph built operator by operator: its cache is a variable, weights stay compressed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxgpt_export.interchange.blocks import block_size_for, round_blocks

from jaxgpt_bench.peers.peer import (
    NO_SETTINGS,
    PLAIN,
    Artifact,
    Peer,
    Prepared,
    Settings,
    Variant,
    arrays,
    head_weight,
    weight_bytes,
)

INT4_BLOCK = 128
GROUPS = (0, 32, 128)
SETTING = "dynamic_quantization_group_size"


class Graph:
    """GPT-2 as operators: tokens (1, T), positions (1, T), beams (1) -> the last logits (1, 1, V).

    Keys and values are concatenated to variables, in the form that the CPU plugin takes for a cache of
    its own; compressed weights are integers -> float -> times a scale, which it multiplies as integers.

    Args:
      artifact: float32.
      precision: of the matrices.
    """

    def __init__(self, artifact: Artifact, precision: str) -> None:
        import openvino as ov
        from openvino import opset13 as op

        self._op, self._precision = op, precision
        self._heads = artifact.config.n_head
        self._head_size = artifact.config.n_embd // artifact.config.n_head
        self._arrays = arrays(artifact)
        self._tokens = op.parameter([-1, -1], ov.Type.i64, name="tokens")
        self._positions = op.parameter([-1, -1], ov.Type.i64, name="positions")
        self._beams = op.parameter([-1], ov.Type.i32, name="beams")
        self._inputs = {"tokens": self._tokens, "positions": self._positions, "beams": self._beams}
        for name, node in self._inputs.items():
            node.output(0).set_names({name})
        self._zero, self._one = op.constant(0, ov.Type.i64), op.constant(1, ov.Type.i64)
        batch = op.gather(op.shape_of(self._tokens), self._integers(0), self._zero)
        sizes = (self._integers(n) for n in (self._heads, 0, self._head_size))
        self._empty = op.broadcast(op.constant(np.float32(0)), op.concat([batch, *sizes], 0))
        self._sinks: list[Any] = []

    def model(self, n_layer: int, head: Any) -> Any:
        """Return the model.

        Args:
          n_layer: blocks.
          head: (V, C).
        """
        import openvino as ov

        op, arrays = self._op, self._arrays
        word = op.gather(op.constant(arrays["wte.weight"]), self._tokens, self._zero)
        x = op.add(word, op.gather(op.constant(arrays["wpe.weight"]), self._positions, self._zero))
        mask = self._mask()
        for index in range(n_layer):
            at = f"h.{index}"
            x = op.add(x, self._attention(f"{at}.attn", self._norm(f"{at}.ln_1", x), mask))
            wide = op.gelu(self._layer(f"{at}.mlp.c_fc", self._norm(f"{at}.ln_2", x)), "tanh")
            x = op.add(x, self._layer(f"{at}.mlp.c_proj", wide))
        last = op.gather(self._norm("ln_f", x), self._integers(-1), self._one)
        logits = op.matmul(last, compressed(head, self._precision), False, True)
        return ov.Model([op.result(logits)], self._sinks, list(self._inputs.values()), "gpt2")

    def _integers(self, *values: int) -> Any:
        return self._op.constant(np.array(values, np.int64))

    def _layer(self, name: str, x: Any) -> Any:
        product = self._op.matmul(x, compressed(self._arrays[f"{name}.weight"], self._precision), False, True)
        return self._op.add(product, self._op.constant(self._arrays[f"{name}.bias"][None, None]))

    def _norm(self, name: str, x: Any) -> Any:
        from jaxgpt.shared.architecture import LAYER_NORM_EPSILON

        op = self._op
        plain = op.mvn(x, self._integers(-1), True, LAYER_NORM_EPSILON, "INSIDE_SQRT")
        scaled = op.multiply(plain, op.constant(self._arrays[f"{name}.weight"][None, None]))
        return op.add(scaled, op.constant(self._arrays[f"{name}.bias"][None, None]))

    def _mask(self) -> Any:
        """Return what is added to the scores: a position sees those up to its own.

        (1, 1, T, whole length), 0 or lowest.
        """
        op = self._op
        own = op.unsqueeze(self._positions, self._integers(1, 3))
        length = op.add(op.reduce_max(self._positions, self._integers(0, 1)), self._one)
        every = op.range(self._zero, length, self._one, "i64")
        seen = op.less_equal(op.unsqueeze(every, self._integers(0, 1, 2)), own)
        lowest = np.float32(np.finfo(np.float32).min)
        return op.select(seen, op.constant(np.float32(0)), op.constant(lowest))

    def _cached(self, name: str, new: Any) -> Any:
        """Append to a variable of keys or values (1, H, T, D); return all that it holds."""
        import openvino as ov

        op, info = self._op, ov.op.util.VariableInfo()
        info.data_shape = ov.PartialShape([-1, self._heads, -1, self._head_size])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = ov.op.util.Variable(info)
        past = op.gather(op.read_value(self._empty, variable), self._beams, self._zero)
        whole = op.concat([past, new], 2)
        self._sinks.append(op.assign(whole, variable))
        return whole

    def _attention(self, name: str, x: Any, mask: Any) -> Any:
        import openvino as ov

        op, H, D = self._op, self._heads, self._head_size
        parts = op.split(self._layer(f"{name}.c_attn", x), op.constant(2, ov.Type.i64), 3)
        q, k, v = (
            op.transpose(
                op.reshape(parts.output(part), self._integers(0, 0, H, D), True), self._integers(0, 2, 1, 3)
            )
            for part in range(3)
        )
        k, v = self._cached(f"{name}.key", k), self._cached(f"{name}.value", v)
        mixed = op.scaled_dot_product_attention(q, k, v, mask, causal=False)
        joined = op.transpose(mixed, self._integers(0, 2, 1, 3))
        return self._layer(f"{name}.c_proj", op.reshape(joined, self._integers(0, 0, H * D), True))


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


def plugin_settings(threads: int, group: int) -> dict[str, Any]:
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
    changes_values: ClassVar[bool] = True
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8-weight-only", "int4-weight-only")

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Write the graph and its weights."""
        import openvino as ov

        model = Graph(artifact, precision).model(artifact.config.n_layer, head_weight(artifact))
        ov.save_model(model, scratch / "model.xml", compress_to_fp16=False)
        (scratch / "context").write_text(str(artifact.config.block_size), encoding="utf-8")

        def matrix_bytes(matrix: Any) -> float:
            O, I = matrix.shape
            if precision == "int4-weight-only":
                return O * I / 2 + 4.0 * O * I / block_size_for(I, INT4_BLOCK)
            return 4.0 * O * I if precision == "fp32" else O * I + 4.0 * O

        return Prepared(scratch, weight_bytes(artifact, matrix_bytes))

    def settings_tried(self, precision: str) -> tuple[Settings, ...]:
        """Round the inputs of quantized weights in groups, or not."""
        return tuple({SETTING: group} for group in GROUPS) if precision != "fp32" else (NO_SETTINGS,)

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> OpenVinoSession:
        """Compile the model."""
        return OpenVinoSession(path, plugin_settings(threads, settings.get(SETTING, 0)))


PEER = OpenVino()
