"""llama.cpp, through llama-cpp-python, from GGUF files.

It rounds inputs in blocks of 32 as well where weights are rounded. Flash attention is on (1.15 times as
fast on free cores), weights are copied into memory (huge pages) and laid out for the CPU, but not where
that would be AMX: builds of today crash there with Q8_0 and Q4_0.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jaxgpt_bench.peers.peer import NO_SETTINGS, OPENMP, PLAIN, Artifact, Peer, Prepared, Settings, Variant

if TYPE_CHECKING:
    from jaxgpt_export.interchange.gguf_file import FileType
else:  # it imports PyTorch
    FileType = str

FILES: dict[str, FileType] = {"fp32": "f32", "fp16": "f16", "int8-weight-only": "q8_0"}
BATCH = 512


class LlamaCppSession:
    """A GGUF file run by llama.cpp, which takes tokens one batch after the other.

    Args:
      path: the file.
      threads: CPU threads; 0 takes its own choice.
      float32_cache: keys and values in float32, not float16.
      flash: flash attention.
      repack: weights may be laid out anew for this CPU's instructions.
      mapped: weights stay in the mapped file.
    """

    def __init__(
        self,
        path: Path,
        threads: int = 0,
        float32_cache: bool = False,
        flash: bool = False,
        repack: bool = True,
        mapped: bool = True,
    ) -> None:
        import llama_cpp

        self._library = llama_cpp
        _be_silent()
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_extra_bufts = repack
        if hasattr(model, "load_mode"):
            model.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if mapped else llama_cpp.LLAMA_LOAD_MODE_NONE
        else:  # before 0.3.30 or so
            model.use_mmap = mapped
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        self.block_size = int(llama_cpp.llama_model_n_ctx_train(self._model))
        self._shape = (llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)),)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self.block_size, BATCH, BATCH
        settings.no_perf = True
        settings.flash_attn_type = int(flash)
        if threads:
            settings.n_threads = settings.n_threads_batch = threads
        if float32_cache:
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._one = (ctypes.c_int32 * 1)()

    def prefill(self, tokens: Sequence[int]) -> Any:
        """Take a prompt; return the logits (V,) after it."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        for begin in range(0, len(tokens), BATCH):
            part = tokens[begin : begin + BATCH]
            logits = self._take((ctypes.c_int32 * len(part))(*part), len(part))
        return logits

    def decode(self, token: int) -> Any:
        """Take one more token; return the logits (V,) after it."""
        self._one[0] = token
        return self._take(self._one, 1)

    def _take(self, tokens: Any, count: int) -> Any:
        failed = self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, count))
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")
        pointer = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, self._shape)


@functools.cache
def _be_silent() -> Any:
    """Let llama.cpp say nothing; the callback must not be collected, so it stays in the cache."""
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def write_q4_0(source: Path, target: Path) -> None:
    """Write a float32 GGUF file again with its matrices in blocks of 32 weights of 4 bits.

    Args:
      source: float32.
      target: the new file. Norms, biases and positions stay as they are.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "gpt2")
    left = {"general.architecture", "general.file_type", "general.quantization_version"}
    for field in reader.fields.values():
        if field.name in left or field.name.startswith("GGUF."):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    for tensor in reader.tensors:
        if tensor.data.ndim == 1 or tensor.name == "position_embd.weight":
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, q4_0), raw_dtype=q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def touched_bytes(path: Path) -> int:
    """Return the bytes of weights that one token reads: all tensors but rows of embeddings."""
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    skipped = {"position_embd.weight"} | ({"token_embd.weight"} if "output.weight" in sizes else set())
    return sum(size for name, size in sizes.items() if name not in skipped)


def has_amx() -> bool:
    """Whether weights would be laid out for AMX, where builds of today crash when they load a matrix."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "amx_int8" in cpu.read_text(encoding="utf-8")


class LlamaCpp(Peer):
    """llama.cpp."""

    engine: ClassVar[str] = "llama.cpp"
    modules: ClassVar[tuple[str, ...]] = ("gguf", "llama_cpp")
    install: ClassVar[str] = "gguf llama-cpp-python"
    precisions: ClassVar[tuple[str, ...]] = (*FILES, "int4-weight-only")
    environments: ClassVar[tuple[dict[str, str], ...]] = OPENMP
    kv_bytes: ClassVar[int] = 2

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Write a GGUF file."""
        from jaxgpt_export.interchange.gguf_file import write_gguf

        path = scratch / "model.gguf"
        if precision in FILES:
            write_gguf(artifact, artifact.tokenizer(), path, FILES[precision])
        else:
            write_gguf(artifact, artifact.tokenizer(), scratch / "float32.gguf", "f32")
            write_q4_0(scratch / "float32.gguf", path)
            (scratch / "float32.gguf").unlink()
        return Prepared(path, touched_bytes(path))

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> LlamaCppSession:
        """Load the file."""
        return LlamaCppSession(path, threads, flash=True, repack=not has_amx(), mapped=False)


PEER = LlamaCpp()
