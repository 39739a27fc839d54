"""An artifact packed for the native engine: which it can run, and how its tensors reach it."""

import ctypes
import os
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from jaxgpt.shared.architecture import BLOCK_LINEARS, BLOCK_NORMS, HEAD, linear_layers
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.machine import usable_cores
from jaxgpt.shared.tensor_file import Array, Arrays, release_pages, require_unchanged

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.rotary import rope_table
from jaxgpt_export.native.library import call_engine, engine_library, instruction_sets

LAST_NORM = len(BLOCK_NORMS)  # number of ln_f among the norms
GROUP_STEP, LARGEST_GROUP = 8, 2048
LARGEST_HEAD = 512


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")),
        *((name, ctypes.c_int32) for name in ("tied", "rotary", "max_bits")),
        ("bits", ctypes.c_void_p),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "weight_scale", "group_factor", "bias", "smooth")),
        *((name, ctypes.c_int32) for name in ("outputs", "inputs", "bits", "group_size", "two_level")),
        ("input_scale", ctypes.c_float),
    ]


def unsupported_reason(artifact: Artifact) -> str | None:
    """Return why the engine cannot run an artifact; None where it can."""
    if not instruction_sets():
        return "it was not built: pip install found no C++17 compiler (GCC, Clang)"
    schemes = artifact.schemes
    for name in ("wpe", *(() if artifact.config.tied else ("wte",))):
        if name in schemes and schemes[name].weight_bits == 4:
            return f"the rows of {name} have 4 bits, it reads rows of 8, 16 or 32"
    if artifact.config.head_size > LARGEST_HEAD:
        return f"heads of {artifact.config.head_size} channels are larger than its {LARGEST_HEAD}"
    for size in sorted({scheme.group_size for scheme in schemes.values()} - {0}):
        if size % GROUP_STEP or size > LARGEST_GROUP:
            return f"groups of {size} weights are none of its ({GROUP_STEP}, 16, ... {LARGEST_GROUP})"
    return None


class NativeModel:
    """The packed weights of an artifact and the threads that multiply with them.

    Args:
      artifact: that is packed.
      threads: that compute; 0 takes all cores that this process may use.
      isa: the instruction set; None takes JAXGPT_ISA's, or the best.
      release: give the artifact's mapped memory back as it is packed; edits of its tensors are lost then.

    Attributes:
      config: shape.
      isa: the instruction set that is used.
      bytes_per_token: weights and steps that one decode step reads (the cache is counted by the session).

    Raises:
      UserError: the engine cannot run the artifact (see unsupported_reason), threads or JAXGPT_ISA are out of
        range, or the artifact's file was written to meanwhile.
    """

    def __init__(
        self, artifact: Artifact, threads: int = 0, isa: str | None = None, *, release: bool = False
    ) -> None:
        reason = unsupported_reason(artifact)
        if reason is not None:
            raise UserError(f"{artifact.folder}: the native engine cannot run it: {reason}")
        most = usable_cores()
        if not 0 <= threads <= most:
            raise UserError(
                f"threads ({threads}) must lie in 0 (all) to {most}, the cores this process may use"
            )
        self.config = artifact.config
        self.folder = artifact.folder
        isa = isa or os.environ.get("JAXGPT_ISA") or None
        shape, bits = _shape(artifact), _bits(artifact)
        shape.bits = bits.ctypes.data
        self._handle = ctypes.c_void_p()
        free_with(self, engine_library().jaxgpt_model_free, self._handle)  # an interrupt may follow the call
        name = isa.encode() if isa else None
        call_engine(
            "jaxgpt_model_new", ctypes.byref(shape), name, threads or most, ctypes.byref(self._handle)
        )
        self._fill(artifact, release)
        require_unchanged(artifact.tensors.values())
        self.isa: str = engine_library().jaxgpt_model_isa(self._handle).decode()
        self.bytes_per_token: int = engine_library().jaxgpt_model_bytes(self._handle)

    def _fill(self, artifact: Artifact, release: bool) -> None:
        tensors, config, handle = artifact.tensors, artifact.config, self._handle
        for block in range(config.n_layer):
            for number, name in enumerate(BLOCK_NORMS):
                self._set_norm(tensors, f"h.{block}.{name}", number, block)
            for number, name in enumerate(BLOCK_LINEARS):
                linear = _linear(f"h.{block}.{name}", artifact)
                call_engine("jaxgpt_model_set_linear", handle, number, block, ctypes.byref(linear))
            if release:
                release_pages(tensor for name, tensor in tensors.items() if name.startswith(f"h.{block}."))
        self._set_norm(tensors, "ln_f", LAST_NORM, 0)
        head = _linear(HEAD, artifact)
        call_engine("jaxgpt_model_set_head", handle, ctypes.byref(head))
        self._set_rows(
            "jaxgpt_model_set_tokens", tensors, None if config.tied else "wte", tensors.get("wte.smooth")
        )
        if config.positions == "rotary":
            table = rope_table(config)
            call_engine("jaxgpt_model_set_rope_table", handle, _pointer(table))
        else:
            self._set_rows("jaxgpt_model_set_positions", tensors, "wpe")
        call_engine("jaxgpt_model_ready", handle)
        if release:
            release_pages(tensors.values())

    def _set_norm(self, tensors: Arrays, name: str, number: int, block: int) -> None:
        gain, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        call_engine("jaxgpt_model_set_norm", self._handle, number, block, _pointer(gain), _pointer(bias))

    def _set_rows(self, function: str, tensors: Arrays, name: str | None, *more: Array | None) -> None:
        """Pass the rows of an embedding, int8 with their scales or as float32; None: the head has them."""
        rows, scale = None, None
        if name is not None:
            rows, scale = tensors[f"{name}.weight"], tensors.get(f"{name}.weight_scale")
            rows = rows if scale is not None else np.ascontiguousarray(rows, dtype=np.float32)
        call_engine(function, self._handle, _pointer(rows), _pointer(scale), *map(_pointer, more))


def _shape(artifact: Artifact) -> _Shape:
    config = artifact.config
    return _Shape(
        config.n_layer,
        config.n_head,
        config.n_embd,
        config.block_size,
        config.vocab_size,
        int(config.tied),
        int(config.positions == "rotary"),
        max(8, *(scheme.weight_bits for scheme in artifact.schemes.values())),
    )


def _bits(artifact: Artifact) -> npt.NDArray[np.uint8]:
    """Return the bits of each matrix in the order of jaxgpt_shape, (4 L + 1)."""
    blocks = range(artifact.config.n_layer)
    names = (*(f"h.{block}.{name}" for block in blocks for name in BLOCK_LINEARS), HEAD)
    return np.array([artifact.schemes[name].weight_bits for name in names], np.uint8)


def free_with(owner: object, free: Callable[..., object], *kept: object) -> None:
    """Call `free` with `kept` when its owner is gone; at the interpreter's end the system frees it all."""
    weakref.finalize(owner, free, *kept).atexit = False


def _pointer(array: Array | None) -> ctypes.c_void_p | None:
    if array is None:
        return None
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def _linear(name: str, artifact: Artifact) -> _Linear:
    """Describe a linear layer; rounded weights take a float input rounded twice, as a two-level one is."""
    tensors = artifact.tensors
    layer, scheme = linear_layers(artifact.config)[name], artifact.schemes[name]
    packed = "weight_packed" if scheme.weight_bits == 4 else "weight"
    input_scale = tensors.get(f"{name}.input_scale")
    return _Linear(
        _pointer(tensors[f"{layer.matrix}.{packed}"]),
        _pointer(tensors.get(f"{layer.matrix}.weight_scale")),
        _pointer(tensors.get(f"{layer.matrix}.group_factor")),
        _pointer(tensors.get(f"{name}.bias")),
        # A head's own smoothing is folded into ln_f.
        _pointer(tensors[f"{name}.smooth"]) if scheme.smoothing else None,
        layer.outputs,
        layer.inputs,
        scheme.weight_bits,
        scheme.group_size,
        int(not scheme.is_float and (scheme.activation == "float" or scheme.two_level)),
        0.0 if input_scale is None else float(input_scale),
    )
