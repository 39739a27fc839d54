"""The native engine: whole steps of a quantized artifact in C++, called through ctypes.

    from jaxgpt_export.native.native_model import NativeModel
    from jaxgpt_export.native.native_session import NativeSession
    session = NativeSession(NativeModel(read_artifact(folder)))

`export/native/` is its source, docs/engine.md says how it works. It computes what `model.arithmetic`
defines, with two liberties: layers with a float input (weight-only) take it rounded twice, as a two-level
input is, and the KV cache holds float16 unless told otherwise. Where no compiler built it, or the artifact
has a layer that it does not know (float32 weights), `unsupported_reason` says so and the PyTorch module
serves.

The GIL is released during every call. Sessions of one model may be used from several threads; their steps
take turns.
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError

VERSION = 2


def library_path() -> Path:
    """Return where the built engine lies, or would lie; JAXGPT_ENGINE names another build of it."""
    built = Path(__file__).parent / "libengine.so"
    return Path(os.environ.get("JAXGPT_ENGINE") or built)


@functools.cache
def engine_library() -> Any:
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


def call_engine(name: str, *arguments: Any) -> None:
    library = engine_library()
    if getattr(library, name)(*arguments) != 0:
        raise UserError(library.jaxgpt_error().decode())


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets of this machine and this build, the best first; () without a build."""
    library = engine_library()
    return () if library is None else tuple(library.jaxgpt_instruction_sets().decode().split())
