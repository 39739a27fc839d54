"""Tensors in .safetensors files, as numpy arrays over a memory map.

numpy has no bfloat16: such tensors have the dtype BFLOAT16, one field that holds the 16 bits. The header is
checked by the safetensors library before it is read here, so a damaged file is refused and not misread.
"""

import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from jaxgpt.shared.errors import UserError

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
# Name in the file's header, dtype here, name that the library takes when it writes.
_DTYPES: tuple[tuple[str, np.dtype[Any], str], ...] = (
    ("F64", np.dtype("<f8"), "float64"),
    ("F32", np.dtype("<f4"), "float32"),
    ("F16", np.dtype("<f2"), "float16"),
    ("BF16", BFLOAT16, "bfloat16"),
    ("I64", np.dtype("<i8"), "int64"),
    ("I32", np.dtype("<i4"), "int32"),
    ("I16", np.dtype("<i2"), "int16"),
    ("I8", np.dtype("i1"), "int8"),
    ("U8", np.dtype("u1"), "uint8"),
    ("BOOL", np.dtype("?"), "bool"),
)
_DTYPE_OF = {stored: dtype for stored, dtype, _ in _DTYPES}
_NAME_OF = {dtype: name for _, dtype, name in _DTYPES}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return what messages call a dtype: float32, bfloat16, ..."""
    return _NAME_OF.get(dtype, str(dtype))


class _MappedFile(mmap.mmap):
    """A file in memory; it is asked later whether it was written to since.

    Attributes:
      path: of the file.
      found: what the system said of the file when it was mapped.
    """

    path: Path
    found: os.stat_result


def read_tensor_file(path: Path) -> Arrays:
    """Map a .safetensors file into memory.

    Args:
      path: the file.

    Returns:
      Arrays by name. Writing to one changes this process's copy alone, never the file.

    Raises:
      ValueError: it is no whole file of tensors, or one has a dtype that no model here has; the message tells
        which.
      OSError: it can't be opened.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks the header
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        mapped = _MappedFile(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped.path, mapped.found = path.absolute(), found
    (length,) = struct.unpack("<Q", mapped[:8])
    header = json.loads(mapped[8 : 8 + length])
    arrays: Arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPE_OF:
            raise ValueError(f"{name} is {entry['dtype']}, expected one of {', '.join(_DTYPE_OF)}")
        start, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        dtype, count = _DTYPE_OF[entry["dtype"]], math.prod(shape)
        flat = np.frombuffer(mapped, dtype, count, start) if count else np.zeros(0, dtype)
        arrays[name] = flat.reshape(shape)
    return arrays


def write_tensor_file(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays into a .safetensors file that others may read (the library makes it private).

    Args:
      path: the file, under a temporary name or in a temporary folder.
      arrays: by name.

    Raises:
      TypeError: a dtype that such a file does not have.
      OSError: the system can't write it: no space left, say.
    """
    for name, array in arrays.items():
        if array.dtype not in _NAME_OF:
            raise TypeError(f"{name} is {array.dtype}, expected one of {', '.join(_NAME_OF.values())}")
    whole = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    entries = {
        name: TensorSpec(
            dtype=_NAME_OF[array.dtype], shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in whole.items()
    }
    try:
        serialize_file(entries, str(path), {"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def release_pages(arrays: Iterable[Array]) -> None:
    """Give the memory of mapped arrays back to the system; reading them brings it back from the file.

    Packed weights and the file's pages together would take an artifact's size twice. What was written to the
    arrays is lost. Arrays that are not mapped from a file are left alone.
    """
    for array in arrays:
        owner = _owner(array)
        if owner is None:
            continue
        begin = array.ctypes.data - np.frombuffer(owner, np.uint8, 1).ctypes.data
        start = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (begin + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop and hasattr(owner, "madvise"):
            owner.madvise(mmap.MADV_DONTNEED, start, stop - start)


def require_unchanged(arrays: Iterable[Array]) -> None:
    """Refuse arrays whose file was written to since it was mapped: they may hold parts of two models.

    A file whose name another one has taken is still what it was.

    Raises:
      UserError: one was; the message names it.
    """
    for mapped in {id(owner): owner for owner in map(_owner, arrays) if owner is not None}.values():
        try:
            now, then = mapped.path.stat(), mapped.found
        except OSError:
            continue
        same_file = os.path.samestat(now, then)
        if same_file and (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise UserError(
                f"{mapped.path} was written to while it was read; wait until that is done, and run again"
            )


def _owner(array: Array) -> _MappedFile | None:
    """Return the file that an array lies in, if any."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    owner = base.obj if isinstance(base, memoryview) else base
    return owner if isinstance(owner, _MappedFile) else None
