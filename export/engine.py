"""The native engine: whole steps of a quantized artifact in C++, called through ctypes.

    from export.engine import NativeModel, NativeSession
    session = NativeSession(NativeModel(read_artifact(folder)))

`export/native/` is its source, docs/engine.md says how it works. It computes what `export.arithmetic`
defines, with two liberties: layers with a float input (weight-only) take it rounded twice, as a fine input
is, and the KV cache holds float16 unless told otherwise. Where no compiler built it, or the artifact has a
layer that it does not know (float32 weights), `why_not` says so and the PyTorch module serves.

The GIL is released during every call. Sessions of one model may be used from several threads; their steps
take turns.
"""

import ctypes
import functools
import math
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxgpt.shared.errors import UserError
from torch import Tensor

from export.artifact import Artifact
from export.model import rotary_turns
from export.quantization import HEAD, Quantization, linear_layers

VERSION = 2
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NORMS = ("ln_1", "ln_2")
LAST_NORM = 2
CACHES = {"fp32": 0, "fp16": 1, "int8": 2}
GROUP_STEP, LARGEST_GROUP = 8, 2048
LARGEST_HEAD = 512
WARM_PASSES = 3

CacheKind = Literal["fp32", "fp16", "int8"]


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


def library_path() -> Path:
    """Return where the built engine lies, or would lie; JAXGPT_ENGINE names another build of it."""
    built = Path(__file__).parent / "native" / "libengine.so"
    return Path(os.environ.get("JAXGPT_ENGINE") or built)


@functools.cache
def _library() -> Any:
    path = library_path()
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(
            f"the native engine cannot be loaded ({error}); build it again: pip install -e ."
        ) from None
    version = library.jaxgpt_version() if hasattr(library, "jaxgpt_version") else "none"
    if version != VERSION:
        raise UserError(
            f"{path} is version {version} of the engine, expected {VERSION}; build it again: pip install -e ."
        )
    library.jaxgpt_error.restype = ctypes.c_char_p
    library.jaxgpt_instruction_sets.restype = ctypes.c_char_p
    library.jaxgpt_model_isa.restype = ctypes.c_char_p
    library.jaxgpt_model_isa.argtypes = [ctypes.c_void_p]
    library.jaxgpt_model_bytes.restype = ctypes.c_int64
    library.jaxgpt_model_bytes.argtypes = [ctypes.c_void_p]
    library.jaxgpt_session_exact_outputs.restype = ctypes.c_int64
    library.jaxgpt_session_exact_outputs.argtypes = [ctypes.c_void_p]
    library.jaxgpt_model_use_screen.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.jaxgpt_model_free.argtypes = [ctypes.c_void_p]
    library.jaxgpt_session_free.argtypes = [ctypes.c_void_p]
    library.jaxgpt_session_length.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.jaxgpt_session_forward.argtypes = [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_void_p] * 5]
    library.jaxgpt_session_follow.argtypes = [
        ctypes.c_void_p,
        *[ctypes.c_int32] * 4,
        *[ctypes.c_void_p] * 2,
    ]
    library.jaxgpt_read_seconds.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return library


def _call(name: str, *arguments: Any) -> None:
    library = _library()
    if getattr(library, name)(*arguments) != 0:
        raise UserError(library.jaxgpt_error().decode())


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets of this machine and this build, the best first; () without a build."""
    library = _library()
    return () if library is None else tuple(library.jaxgpt_instruction_sets().decode().split())


def why_not(artifact: Artifact) -> str | None:
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


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota(Path("/sys/fs/cgroup")))))


def cpu_quota(root: Path) -> float:
    """Return the cores that a control group allows; infinity without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text(encoding="utf-8").split()[:2]  # version 2
        return math.inf if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        pass
    try:
        folder = root / "cpu"  # version 1
        allowed = float((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        return (
            allowed / float((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
            if allowed > 0
            else math.inf
        )
    except (OSError, ValueError):
        return math.inf


class NativeModel:
    """The packed weights of an artifact and the threads that multiply with them.

    Attributes:
      config: shape.
      isa: the instruction set that is used.
      bytes_per_token: weights and steps that one decode step reads (the cache is counted by the session).

    Raises:
      UserError: the engine cannot run the artifact (see why_not), or threads or JAXGPT_ISA are out of range.
    """

    def __init__(self, artifact: Artifact, threads: int = 0, isa: str | None = None) -> None:
        reason = why_not(artifact)
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
        _call("jaxgpt_model_new", ctypes.byref(shape), name, threads or most, ctypes.byref(self._handle))
        _free_with(self, _library().jaxgpt_model_free, self._handle)
        self._fill(artifact, artifact.quantization)
        self.isa: str = _library().jaxgpt_model_isa(self._handle).decode()
        self.bytes_per_token: int = _library().jaxgpt_model_bytes(self._handle)

    def use_screen(self, use: bool) -> None:
        """Whether greedy steps read the screen of the head first; they do unless told otherwise."""
        _library().jaxgpt_model_use_screen(self._handle, int(use))

    def _fill(self, artifact: Artifact, quantization: Quantization) -> None:
        tensors, config = artifact.tensors, artifact.config
        mapped = _mapped_ranges(artifact.folder / "model.safetensors")
        for layer in range(config.n_layer):
            for which, name in enumerate(NORMS):
                self._set_norm(tensors, f"h.{layer}.{name}", which, layer)
            for which, name in enumerate(LAYERS):
                linear = _linear(f"h.{layer}.{name}", artifact, quantization)
                _call("jaxgpt_model_set_linear", self._handle, which, layer, ctypes.byref(linear))
            of_layer = [tensor for name, tensor in tensors.items() if name.startswith(f"h.{layer}.")]
            _release(of_layer, mapped)
        self._set_norm(tensors, "ln_f", LAST_NORM, 0)
        head = _linear(HEAD, artifact, quantization)
        _call("jaxgpt_model_set_head", self._handle, ctypes.byref(head))
        rows = (None, None) if config.tied else _rows(tensors, "wte")
        _call("jaxgpt_model_set_tokens", self._handle, *rows, _pointer(tensors.get("wte.smooth")))
        if config.positions == "rotary":
            turns = rotary_turns(config).contiguous()
            _call("jaxgpt_model_set_turns", self._handle, _pointer(turns))
        else:
            _call("jaxgpt_model_set_positions", self._handle, *_rows(tensors, "wpe"))
        _call("jaxgpt_model_ready", self._handle)
        _release(list(tensors.values()), mapped)

    def _set_norm(self, tensors: dict[str, Tensor], name: str, which: int, layer: int) -> None:
        gain, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        _call("jaxgpt_model_set_norm", self._handle, which, layer, _pointer(gain), _pointer(bias))


def _free_with(owner: object, free: Callable[..., object], *kept: object) -> None:
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


class NativeSession:
    """Generates with a native model and a KV cache; an `Engine` of `shared.generation` for one text.

    Args:
      model: may be shared by sessions.
      slots: texts that are generated side by side.
      cache: what keys and values are kept as.
    """

    def __init__(self, model: NativeModel, slots: int = 1, cache: CacheKind = "fp16") -> None:
        self.model = model
        self.slots = slots
        self.block_size = model.config.block_size
        self._handle = ctypes.c_void_p()
        _call("jaxgpt_session_new", model._handle, slots, CACHES[cache], ctypes.byref(self._handle))
        _free_with(self, _free_session, self._handle, model)

    def start(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Take a prompt of 1 to block_size tokens into slot 0; return the logits (V,) after it."""
        self.truncate(0)
        return self.forward(tokens)[0]

    def step(self, token: int) -> npt.NDArray[np.float32]:
        """Take one more token; return the logits (V,) after it."""
        return self.forward([token])[0]

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget the tokens of a slot from `length` on."""
        _call("jaxgpt_session_truncate", self._handle, slot, length)

    def length(self, slot: int = 0) -> int:
        """Return the number of tokens that a slot holds."""
        return int(_library().jaxgpt_session_length(self._handle, slot))

    def forward(
        self, tokens: Sequence[int], slots: Sequence[int] | None = None, every: bool = False
    ) -> npt.NDArray[np.float32]:
        """Take tokens, each the next one of its slot.

        Args:
          tokens: (M,) ids.
          slots: (M,) of each; the tokens of a slot are neighbours. None: all are of slot 0.
          every: give the logits after every token, not only after the last one of each slot.

        Returns:
          Logits (M or number of slots, V), in order.
        """
        order = self._order(tokens, slots, every)
        wanted = int(order[2].sum())
        logits = np.empty((wanted, self.model.config.vocab_size), dtype=np.float32)
        self._forward(order, logits, None)
        return logits

    def greedy(
        self, tokens: Sequence[int], slots: Sequence[int] | None = None, every: bool = False
    ) -> npt.NDArray[np.int32]:
        """Take tokens as `forward` does; return the most probable next one, the lowest of equals."""
        order = self._order(tokens, slots, every)
        best = np.empty(int(order[2].sum()), dtype=np.int32)
        self._forward(order, None, best)
        return best

    def follow(self, token: int, most: int = 1, end: int = -1) -> list[int]:
        """Take a token into slot 0 and go on greedily; return what follows it.

        Args:
          token: the next one.
          most: tokens to return at most; all but the last of them are taken too.
          end: a token after which there is no more.

        Raises:
          UserError: the token is none, or the context has no room for so many; nothing was taken then.
        """
        if not 1 <= most <= self.block_size:
            raise UserError(f"most ({most}) must lie in 1 to {self.block_size}, the model's context")
        if not 0 <= token < self.model.config.vocab_size:
            raise UserError(f"token {token} is not in a vocabulary of {self.model.config.vocab_size}")
        found, made = (ctypes.c_int32 * most)(), ctypes.c_int32()
        _call("jaxgpt_session_follow", self._handle, 0, token, most, end, found, ctypes.byref(made))
        return found[: made.value]

    def _order(self, tokens: Sequence[int], slots: Sequence[int] | None, every: bool) -> tuple[Any, Any, Any]:
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        places = np.zeros_like(ids) if slots is None else np.ascontiguousarray(slots, dtype=np.int32)
        if ids.ndim != 1 or ids.shape != places.shape:
            raise ValueError(f"tokens are {ids.shape}, slots {places.shape}; expected a slot for each token")
        wanted = np.ones(len(ids), dtype=np.uint8)
        if not every:
            wanted[:-1] = places[1:] != places[:-1]
        return ids, places, wanted

    def _forward(self, order: tuple[Any, Any, Any], logits: Any, best: Any) -> None:
        ids, places, wanted = order
        inputs = (array.ctypes.data for array in (places, ids, wanted))
        outputs = (None if array is None else array.ctypes.data for array in (logits, best))
        _call("jaxgpt_session_forward", self._handle, len(ids), *inputs, *outputs)

    @property
    def exact_outputs(self) -> int:
        """How many outputs of the head screened steps computed exactly so far."""
        return int(_library().jaxgpt_session_exact_outputs(self._handle))


def _free_session(handle: ctypes.c_void_p, _model: NativeModel) -> None:
    """Free a session before its model, which lives as long as this is to be called."""
    _library().jaxgpt_session_free(handle)


def read_bandwidth(size: int, threads: int, passes: int = 15) -> float:
    """Measure how fast threads read a buffer on huge pages, as a decode step reads weights.

    Some passes before are not counted: they bring what fits into the caches.

    Returns:
      10^9 bytes a second, the median of the passes.
    """
    seconds = np.empty(passes + WARM_PASSES, dtype=np.float64)
    _call("jaxgpt_read_seconds", size, threads, len(seconds), seconds.ctypes.data)
    return float(size / np.median(seconds[WARM_PASSES:]) / 1e9)
