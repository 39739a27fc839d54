"""What the native engine refuses from Python, and what it survives; engine_tour.cpp has its C interface."""

import concurrent.futures
import dataclasses
import gc
import subprocess

import pytest
from conftest import python
from jaxgpt_export.format.artifact import Artifact, read_artifact
from jaxgpt_export.native.library import instruction_sets, library_path
from jaxgpt_export.native.native_model import NativeModel, unsupported_reason
from jaxgpt_export.native.native_session import NativeSession
from tiny_artifacts import SHAPE, tiny_artifacts

from jaxgpt.shared.errors import UserError

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the engine was not built")


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


def test_threads_that_the_system_does_not_lend_are_an_error_and_no_crash() -> None:
    code = f"""
import ctypes, pathlib, resource
library = ctypes.CDLL({str(library_path())!r})
library.jaxgpt_read_seconds.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
seconds = (ctypes.c_double * 1)()
assert library.jaxgpt_read_seconds(2**20, 1000, 1, seconds) == -1
assert library.jaxgpt_read_seconds(2**20, 2, 1, seconds) == 0
"""
    command, environment = python(code)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
