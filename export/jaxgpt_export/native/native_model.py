"""An artifact packed for the native engine."""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.machine import usable_cores
from torch import Tensor

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.scheme import HEAD, Quantization, linear_layers
from jaxgpt_export.model.gpt import rotary_turns
from jaxgpt_export.native.library import call_engine, engine_library, instruction_sets

LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NORMS = ("ln_1", "ln_2")
LAST_NORM = 2
GROUP_STEP, LARGEST_GROUP = 8, 2048
LARGEST_HEAD = 512


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "tied", "rotary")
    ]


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "weight_scale", "bias", "smooth")),
        *((name, ctypes.c_int32) for name in ("outputs", "inputs", "bits", "group_size", "fine")),
        ("input_scale", ctypes.c_float),
    ]


def unsupported_reason(artifact: Artifact) -> str | None:
    """Return why the engine cannot run an artifact; None where it can."""
    quantization = artifact.quantization
    if quantization is None:
        return "it runs quantized artifacts only"
    if not instruction_sets():
        return "it was not built (pip install found no C++ compiler)"
    if 32 in quantization.bits.values():
        return "the artifact keeps a layer in float32"
    if artifact.config.head_size > LARGEST_HEAD:
        return f"heads of {artifact.config.head_size} channels are larger than its {LARGEST_HEAD}"
    size = quantization.group_size
    if size and (size % GROUP_STEP or size > LARGEST_GROUP):
        return f"groups of {size} weights are none of its ({GROUP_STEP}, 16, ... {LARGEST_GROUP})"
    return None


class NativeModel:
    """The packed weights of an artifact and the threads that multiply with them.

    Attributes:
      config: shape.
      isa: the instruction set that is used.
      bytes_per_token: weights and steps that one decode step reads (the cache is counted by the session).

    Raises:
      UserError: the engine cannot run the artifact (see unsupported_reason), or threads or JAXGPT_ISA are out
        of range.
    """

    def __init__(self, artifact: Artifact, threads: int = 0, isa: str | None = None) -> None:
        reason = unsupported_reason(artifact)
        if reason is not None:
            raise UserError(f"{artifact.folder}: the native engine cannot run it: {reason}")
        assert artifact.quantization is not None
        most = usable_cores()
        if not 0 <= threads <= most:
            raise UserError(
                f"threads ({threads}) must lie in 0 (all) to {most}, the cores this process may use"
            )
        self.config = artifact.config
        self.folder = artifact.folder
        config = artifact.config
        isa = isa or os.environ.get("JAXGPT_ISA") or None
        shape = _Shape(
            config.n_layer,
            config.n_head,
            config.n_embd,
            config.block_size,
            config.vocab_size,
            int(config.tied),
            int(config.positions == "rotary"),
        )
        self._handle = ctypes.c_void_p()
        name = isa.encode() if isa else None
        call_engine(
            "jaxgpt_model_new", ctypes.byref(shape), name, threads or most, ctypes.byref(self._handle)
        )
        free_with(self, engine_library().jaxgpt_model_free, self._handle)
        self._fill(artifact, artifact.quantization)
        self.isa: str = engine_library().jaxgpt_model_isa(self._handle).decode()
        self.bytes_per_token: int = engine_library().jaxgpt_model_bytes(self._handle)

    def use_screen(self, use: bool) -> None:
        """Whether greedy steps read the screen of the head first; they do unless told otherwise."""
        engine_library().jaxgpt_model_use_screen(self._handle, int(use))

    def _fill(self, artifact: Artifact, quantization: Quantization) -> None:
        tensors, config = artifact.tensors, artifact.config
        mapped = _mapped_ranges(artifact.folder / "model.safetensors")
        for layer in range(config.n_layer):
            for which, name in enumerate(NORMS):
                self._set_norm(tensors, f"h.{layer}.{name}", which, layer)
            for which, name in enumerate(LAYERS):
                linear = _linear(f"h.{layer}.{name}", artifact, quantization)
                call_engine("jaxgpt_model_set_linear", self._handle, which, layer, ctypes.byref(linear))
            of_layer = [tensor for name, tensor in tensors.items() if name.startswith(f"h.{layer}.")]
            _release(of_layer, mapped)
        self._set_norm(tensors, "ln_f", LAST_NORM, 0)
        head = _linear(HEAD, artifact, quantization)
        call_engine("jaxgpt_model_set_head", self._handle, ctypes.byref(head))
        rows = (None, None) if config.tied else _rows(tensors, "wte")
        call_engine("jaxgpt_model_set_tokens", self._handle, *rows, _pointer(tensors.get("wte.smooth")))
        if config.positions == "rotary":
            turns = rotary_turns(config).contiguous()
            call_engine("jaxgpt_model_set_turns", self._handle, _pointer(turns))
        else:
            call_engine("jaxgpt_model_set_positions", self._handle, *_rows(tensors, "wpe"))
        call_engine("jaxgpt_model_ready", self._handle)
        _release(list(tensors.values()), mapped)

    def _set_norm(self, tensors: dict[str, Tensor], name: str, which: int, layer: int) -> None:
        gain, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        call_engine("jaxgpt_model_set_norm", self._handle, which, layer, _pointer(gain), _pointer(bias))


def free_with(owner: object, free: Callable[..., object], *kept: object) -> None:
    """Call `free` with `kept` when its owner is gone; at the interpreter's end the system frees it all."""
    weakref.finalize(owner, free, *kept).atexit = False


def _mapped_ranges(file: Path) -> list[tuple[int, int]]:
    """Return the addresses (first, end) where a file is mapped into memory; [] where that can't be told."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(file.resolve()))]
    return [(int(first, 16), int(end, 16)) for first, end in ranges]


def _release(tensors: Sequence[Tensor], mapped: Sequence[tuple[int, int]]) -> None:
    """Give the pages of tensors that are mapped from a file back to the system; reading them maps them again.

    Packed weights and the file's pages together would take the artifact's size twice. Memory that is not a
    mapping of this very file is left alone.
    """
    for first, end in mapped:
        for tensor in tensors:
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if first <= start < stop <= end:
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED
                )


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _rows(tensors: dict[str, Tensor], name: str) -> tuple[ctypes.c_void_p | None, ctypes.c_void_p | None]:
    return _pointer(tensors[f"{name}.weight"]), _pointer(tensors[f"{name}.weight_scale"])


def _linear(name: str, artifact: Artifact, quantization: Quantization) -> _Linear:
    tensors = artifact.tensors
    source = linear_layers(artifact.config)[name]
    bits = quantization.bits[source]
    weight = tensors[f"{source}.weight" if bits == 8 else f"{source}.weight_packed"]
    step = tensors.get(f"{name}.input_scale")
    smooth = None if name == HEAD else tensors.get(f"{name}.smooth")
    return _Linear(
        _pointer(weight),
        _pointer(tensors[f"{source}.weight_scale"]),
        _pointer(tensors.get(f"{name}.bias")),
        _pointer(smooth),
        weight.shape[0],
        weight.shape[1] * (8 // bits),
        bits,
        quantization.group_size if bits == 4 else 0,
        int(quantization.weight_only or name in quantization.fine),
        0.0 if step is None else float(step),
    )
