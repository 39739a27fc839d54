"""The native engine: whole steps of an artifact, of integers or floats, in C++, called through ctypes.

    from jaxgpt_export.native.native_model import NativeModel
    from jaxgpt_export.native.native_session import NativeSession
    session = NativeSession(NativeModel(read_artifact(folder)))

`export/native/` is its source, docs/engine.md says how it works. It computes what `model.arithmetic`
defines, with two liberties: layers with rounded weights and a float input (weight-only) take it rounded
twice, as a two-level input is, and the KV cache holds float16 unless told otherwise (float32 beside float32
weights). Where no compiler built it, or the artifact has a layer that it does not know,
`unsupported_reason` says so and the PyTorch module serves.

The GIL is released during every call. Sessions of one model may be used from several threads; their steps
take turns.
"""

import ctypes
import enum
import functools
import os
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError

VERSION = 8


class ErrorCode(enum.IntEnum):
    """What a call returns; engine.h says when."""

    OK = 0
    BAD_ARGUMENT = 1
    BAD_STATE = 2
    OUT_OF_MEMORY = 3
    FAILED = 4


class EngineMemoryError(UserError, MemoryError):
    """The system lends the engine no more memory: one line for a user, a MemoryError for a program."""


_int, _int32, _int64, _text, _pointer = (
    ctypes.c_int,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_char_p,
    ctypes.c_void_p,
)
# Of each function of engine.h: what it returns, what it takes. Structs and arrays go as pointers.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "jaxgpt_error": (_text,),
    "jaxgpt_instruction_sets": (_text,),
    "jaxgpt_model_new": (_int, _pointer, _text, _int, _pointer),
    "jaxgpt_model_set_norm": (_int, _pointer, _int, _int, _pointer, _pointer),
    "jaxgpt_model_set_linear": (_int, _pointer, _int, _int, _pointer),
    "jaxgpt_model_set_head": (_int, _pointer, _pointer),
    "jaxgpt_model_set_tokens": (_int, _pointer, _pointer, _pointer, _pointer),
    "jaxgpt_model_set_positions": (_int, _pointer, _pointer, _pointer),
    "jaxgpt_model_set_rope_table": (_int, _pointer, _pointer),
    "jaxgpt_model_ready": (_int, _pointer),
    "jaxgpt_model_isa": (_text, _pointer),
    "jaxgpt_model_bytes": (_int64, _pointer),
    "jaxgpt_model_free": (None, _pointer),
    "jaxgpt_session_new": (_int, _pointer, _int, _int, _pointer),
    "jaxgpt_session_free": (None, _pointer),
    "jaxgpt_session_truncate": (_int, _pointer, _int, _int),
    "jaxgpt_session_copy": (_int, _pointer, _int, _int, _int),
    "jaxgpt_session_release": (_int, _pointer, _int),
    "jaxgpt_session_touch": (_int, _pointer, _int, _int),
    "jaxgpt_session_bytes_per_token": (_int64, _pointer),
    "jaxgpt_session_length": (_int, _pointer, _int),
    "jaxgpt_session_use_screen": (_int, _pointer, _int),
    "jaxgpt_session_exact_outputs": (_int64, _pointer),
    "jaxgpt_session_forward": (_int, _pointer, _int, *[_pointer] * 5),
    "jaxgpt_session_decode_greedy": (_int, _pointer, *[_int32] * 4, _pointer, _pointer),
    "jaxgpt_top": (_int, _pointer, _int, _int, _pointer, _pointer, _int, *[_pointer] * 4),
    "jaxgpt_draw": (_int, _pointer, _int, _int, *[_pointer] * 3),
    "jaxgpt_sums": (_int, _text, _pointer, _int, _int, _pointer, _int, _pointer),
    "jaxgpt_read_seconds": (_int, _int64, _int, _int, _pointer),
}


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
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def call_engine(name: str, *arguments: Any) -> None:
    """Call a function of engine.h that returns an error code.

    Raises:
      EngineMemoryError: there is not enough memory.
      UserError: any other code; its line is the engine's.
    """
    library = engine_library()
    code = getattr(library, name)(*arguments)
    if code != ErrorCode.OK:
        error = EngineMemoryError if code == ErrorCode.OUT_OF_MEMORY else UserError
        raise error(library.jaxgpt_error().decode())


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets of this machine and this build, the best first; () without a build."""
    library = engine_library()
    return () if library is None else tuple(library.jaxgpt_instruction_sets().decode().split())
