"""What the native engine refuses from Python, and what it survives; engine_tour.cpp has its C interface."""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import gc
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import python
from jaxgpt_export.format.artifact import Artifact, read_artifact
from jaxgpt_export.format.scheme import LayerScheme, Quantization
from jaxgpt_export.native.library import (
    EngineMemoryError,
    ErrorCode,
    call_engine,
    engine_library,
    instruction_sets,
    library_path,
)
from jaxgpt_export.native.native_model import NativeModel, _Shape, unsupported_reason
from jaxgpt_export.native.native_session import NativeSession
from test_export_engine import CONFIG, artifact_of
from tiny_artifacts import SHAPE, tiny_artifacts

from jaxgpt.shared.errors import UserError

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the engine was not built")


ROOT = Path(__file__).resolve().parent.parent
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@contextlib.contextmanager
def address_space(more: int) -> Iterator[None]:
    """Let this process map no more than so many bytes beyond what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# Throws as the engine does, and lets no memory be had from then on.
NO_MEMORY_LEFT = r"""
#include <cstdio>
#include <cstdlib>
#include <new>

#include "runtime/errors.h"

static bool none_left = false;

void* operator new(size_t bytes) {
  void* memory = none_left ? nullptr : malloc(bytes);
  return memory ? memory : throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { free(memory); }
void operator delete(void* memory, size_t) noexcept { free(memory); }

template <typename Error>
void tell(const Error& error) {
  const int code = guarded([&] {
    none_left = true;
    throw error;
  });
  none_left = false;
  printf("%d %s\n", code, error_message());
}

int main() {
  tell(std::bad_alloc());
  tell(EngineError(JAXGPT_BAD_STATE, "a message that is longer than a small string"));
}
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return read_artifact(tiny_artifacts(tmp_path_factory.mktemp("engine"))["int8-dynamic"])


def test_tokens_without_a_slot_each_are_refused(artifact: Artifact) -> None:
    session = NativeSession(NativeModel(artifact, 1), slots=2)
    for tokens, slots, every in (([1, 2, 3], [0, 0], False), ([1, 2], [0], True), ([1], [0, 1], True)):
        with pytest.raises(ValueError, match="a slot for each token"):
            session.forward(tokens, slots, every)
    assert session.length(0) == session.length(1) == 0


def test_heads_that_are_too_large_are_left_to_the_module(artifact: Artifact) -> None:
    config = dataclasses.replace(SHAPE, n_head=1, n_embd=520)
    assert "heads of 520 channels" in str(unsupported_reason(dataclasses.replace(artifact, config=config)))
    assert unsupported_reason(artifact) is None


def test_a_full_context_is_refused_and_stays_usable(artifact: Artifact) -> None:
    session = NativeSession(NativeModel(artifact, 1))
    with pytest.raises(UserError, match="slot 0 would have more tokens than the context of 32 holds"):
        session.prefill(list(range(33)))
    session.prefill(list(range(32)))
    with pytest.raises(UserError, match="context of 32"):
        session.decode(1)
    session.truncate(31)
    assert session.decode(1).shape == (300,)


def test_a_model_lives_as_long_as_its_sessions(artifact: Artifact) -> None:
    model = NativeModel(artifact, 1)
    first, second = NativeSession(model), NativeSession(model, 3, "int8")
    expected = first.prefill([1, 2, 3]).tolist()
    del model, second
    gc.collect()
    assert first.prefill([1, 2, 3]).tolist() == expected


def test_threads_that_share_a_model_get_the_texts_they_get_alone(artifact: Artifact) -> None:
    model = NativeModel(artifact)

    def text(seed: int) -> list[int]:
        session, tokens = NativeSession(model), [seed]
        session.prefill([seed, seed + 1])
        for _ in range(20):
            tokens.append(int(session.greedy([tokens[-1]])[0]))
        return tokens

    alone = [text(seed) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(text, range(8))) == alone


def test_the_codes_are_those_of_the_header() -> None:
    header = (ROOT / "export" / "native" / "engine.h").read_text()
    names = re.search(r"enum \{\s*JAXGPT_OK,.*?\};", header, re.DOTALL)
    assert names is not None
    listed = re.findall(r"JAXGPT_(\w+)", names.group())
    assert {name: number for number, name in enumerate(listed)} == {code.name: code for code in ErrorCode}


def test_codes_tell_bad_arguments_bad_state_and_memory_apart(artifact: Artifact) -> None:
    session = NativeSession(NativeModel(artifact, 1), slots=2)
    library, ids, best = engine_library(), (ctypes.c_int32 * 33)(), (ctypes.c_int32 * 1)()
    wanted = (ctypes.c_uint8 * 33)()

    def forward(rows: int) -> int:
        return int(library.jaxgpt_session_forward(session._handle, rows, ids, ids, wanted, None, best))

    assert forward(1) == ErrorCode.OK
    assert forward(0) == ErrorCode.BAD_ARGUMENT
    assert forward(32) == ErrorCode.BAD_STATE  # the context of 32 holds a token
    assert b"more tokens than the context of 32 holds" in library.jaxgpt_error()
    assert session.length() == 1


def test_memory_that_the_system_does_not_lend_is_a_memory_error_of_one_line(artifact: Artifact) -> None:
    shape = _Shape(n_layer=4096, n_head=64, n_embd=2**15, block_size=2**20, vocab_size=2**24, max_bits=8)
    model = ctypes.c_void_p()
    with (
        address_space(2**32),
        pytest.raises(EngineMemoryError, match="there is not enough memory") as caught,
    ):
        call_engine("jaxgpt_model_new", ctypes.byref(shape), None, 1, ctypes.byref(model))
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, UserError)
    assert NativeSession(NativeModel(artifact, 1)).prefill([1]).shape == (300,)  # and all is well after it


def test_an_error_is_told_where_there_is_no_memory_for_its_message(tmp_path: Path) -> None:
    compiler = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler (g++, clang++ or c++)")
    (tmp_path / "tell.cpp").write_text(NO_MEMORY_LEFT)
    native, program = ROOT / "export" / "native", tmp_path / "tell"
    sources = [str(tmp_path / "tell.cpp"), str(native / "runtime" / "errors.cpp")]
    subprocess.run([compiler, "-std=c++17", f"-I{native}", *sources, "-o", str(program)], check=True)
    told = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [
        f"{ErrorCode.OUT_OF_MEMORY:d} there is not enough memory",
        f"{ErrorCode.BAD_STATE:d} a message that is longer than a small string",
    ]


def reserved_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.skipif(
    not OVERCOMMIT.exists() or OVERCOMMIT.read_text().strip() == "2",
    reason="the system counts what is asked for",
)
def test_a_cache_may_be_larger_than_memory_as_slots_take_none_before_they_are_used(tmp_path: Path) -> None:
    config = dataclasses.replace(SHAPE, block_size=2**14, n_embd=64)
    model = NativeModel(artifact_of("fp32", config, tmp_path / "a"), 1)
    session = NativeSession(model, 2**16, "fp32")
    assert session.slots * config.block_size * session.cache_bytes_per_token == 2**40
    assert (session.forward([1, 2], [2**16 - 1] * 2) == NativeSession(model, 1, "fp32").forward([1, 2])).all()


def test_memory_is_set_aside_for_each_matrix_with_its_own_bits() -> None:
    layers, channels = 16, 1024
    shape = _Shape(layers, 1 << 4, channels, 8, 64, 1, 0, 32)
    bits = np.full(4 * layers + 1, 4, np.uint8)
    bits[1] = 32
    shape.bits = bits.ctypes.data
    model, before = ctypes.c_void_p(), reserved_bytes()
    call_engine("jaxgpt_model_new", ctypes.byref(shape), None, 1, ctypes.byref(model))
    grown = reserved_bytes() - before
    engine_library().jaxgpt_model_free(model)
    four_bits = 12 * channels**2 * layers // 2
    assert four_bits < grown < 2 * four_bits


def test_an_interrupt_after_a_call_leaves_no_handle_behind(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # what other tests left is not counted
    model, freed = NativeModel(artifact, 1), []

    def told(what: str, free: Any, handle: ctypes.c_void_p) -> None:
        freed.append((what, bool(handle)))
        free(handle)

    for what in ("model", "session"):
        free = getattr(engine_library(), f"jaxgpt_{what}_free")
        monkeypatch.setattr(engine_library(), f"jaxgpt_{what}_free", functools.partial(told, what, free))

    def interrupted(name: str, *arguments: object) -> None:
        call_engine(name, *arguments)
        raise KeyboardInterrupt

    for module in ("native_model", "native_session"):
        monkeypatch.setattr(f"jaxgpt_export.native.{module}.call_engine", interrupted)
    for make in (lambda: NativeModel(artifact, 1), lambda: NativeSession(model)):
        with contextlib.suppress(KeyboardInterrupt):
            make()
    gc.collect()
    assert freed == [("model", True), ("session", True)]


def test_a_file_that_is_written_to_before_it_is_packed_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(artifact.folder, tmp_path / "copied"))
    file, other = copied / "model.safetensors", tmp_path / "other"
    read = read_artifact(copied)
    other.write_bytes(file.read_bytes())
    other.replace(file)  # the mapped one stays as it is
    NativeModel(read, 1)
    read = read_artifact(copied)
    with file.open("r+b") as opened:
        opened.write(file.read_bytes())
    os.utime(file, (0, 0))
    with pytest.raises(UserError, match=r"model\.safetensors was written to while it was read; wait"):
        NativeModel(read, 1)


def test_threads_that_the_system_does_not_lend_are_an_error_and_no_crash() -> None:
    code = f"""
import ctypes, pathlib, resource
library = ctypes.CDLL({str(library_path())!r})
library.jaxgpt_read_seconds.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
seconds = (ctypes.c_double * 1)()
assert library.jaxgpt_read_seconds(2**20, 1000, 1, seconds) == 4  # JAXGPT_FAILED
assert library.jaxgpt_read_seconds(2**20, 2, 1, seconds) == 0
"""
    command, environment = python(code)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_the_engine_cannot_do_is_one_clear_error(tmp_path: Path) -> None:
    artifact = artifact_of("int8-dynamic", CONFIG, tmp_path / "a")
    session = NativeSession(NativeModel(artifact, 1), slots=2)
    for tokens, slots, words in (
        ([300], None, "token 300 is not in a vocabulary of 300"),
        ([-1], None, "token -1"),
        ([1], [2], "slot 2 is not one of 2"),
        ([1, 1, 1], [0, 1, 0], "not neighbours"),
        ([1] * 71, None, "context of 70"),
        ([], None, "no tokens"),
    ):
        with pytest.raises(UserError, match=words):
            session.forward(tokens, slots)
    assert session.length() == 0  # nothing was taken
    with pytest.raises(UserError, match="cannot be cut to 5"):
        session.truncate(5)
    with pytest.raises(UserError, match=r"instruction set sse9 is not there; expected one of: .*portable"):
        NativeModel(artifact, 1, "sse9")
    with pytest.raises(UserError, match=r"threads \(999\) must lie in 0"):
        NativeModel(artifact, 999)
    four_bits = {**artifact.schemes, "wpe": LayerScheme(weight_bits=4, group_size=16)}
    unknown = dataclasses.replace(artifact, quantization=Quantization("other", four_bits))
    assert unsupported_reason(unknown) == "the rows of wpe have 4 bits, it reads rows of 8, 16 or 32"
    with pytest.raises(UserError, match="cannot run it: the rows of wpe have 4 bits"):
        NativeModel(unknown)
