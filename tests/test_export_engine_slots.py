"""The native engine as a scheduler uses it: slots copied and released, mixed chunks, reduced rows."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import python
from jaxgpt_bench.speed.random_models import placeholder_tokenizer, random_tensors
from jaxgpt_export.format.artifact import Artifact, read_artifact, write_artifact
from jaxgpt_export.model.build import as_arrays
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.native.native_model import NativeModel
from jaxgpt_export.native.native_session import CacheKind, NativeSession
from jaxgpt_export.quantize.activation import ActivationQuant
from jaxgpt_export.quantize.methods import find_method
from jaxgpt_export.quantize.state_dict import quantized_state_dict
from waiting import SECONDS, join, wait_until

from jaxgpt.generation.sampling import Sampler, Sampling, draws_in_numpy, top_of_row
from jaxgpt.shared.architecture import linear_layers
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")

# Two blocks of 64 positions, the second of which is not full; heads that fill a tile, and heads that do not.
PAIRS = ModelConfig(vocab_size=300, block_size=70, n_layer=2, n_head=4, n_embd=128)
ODD = ModelConfig(vocab_size=300, block_size=70, n_layer=2, n_head=4, n_embd=48)
# Long enough for several chunks of 256 tokens; 4 MB of float32 keys and values a slot.
LONG = ModelConfig(vocab_size=300, block_size=1024, n_layer=4, n_head=2, n_embd=128)
# A sum of exponentials in another order: a few roundings of 2^-53.
LAST_BITS = 1e-15
TWO_THREADS = 2


def artifact_of(config: ModelConfig, folder: Path) -> Artifact:
    """Random weights, four times as large as at the start of a training, in INT8 dynamic."""
    tensors = {name: t * 4 if t.ndim == 2 else t for name, t in random_tensors(config).items()}
    method = find_method("int8-dynamic")
    activations = {name: ActivationQuant(None, None, 0.0) for name in linear_layers(config)}
    found = quantized_state_dict(config, tensors, method.name, method.schemes(config), activations, {})
    folder.mkdir()
    tokenizer = placeholder_tokenizer(config.vocab_size)
    write_artifact(folder, config, found.quantization, as_arrays(found.tensors), tokenizer)
    return read_artifact(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Artifact:
    return artifact_of(PAIRS, folder / "pairs")


@pytest.fixture(scope="module")
def odd(folder: Path) -> Artifact:
    return artifact_of(ODD, folder / "odd")


@pytest.fixture(scope="module")
def long(folder: Path) -> Artifact:
    return artifact_of(LONG, folder / "long")


def text_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, size=length).tolist()


# ---- slots


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("shape", ["pairs", "odd"])
def test_a_copied_slot_goes_on_as_its_source_would(
    shape: str, cache: CacheKind, request: pytest.FixtureRequest
) -> None:
    model = NativeModel(request.getfixturevalue(shape), TWO_THREADS)
    text, other = text_of(68), text_of(70, seed=1)
    expected = NativeSession(model, cache=cache).forward(text, all_logits=True)
    session = NativeSession(model, slots=3, cache=cache)
    session.forward([*text, *other], [0] * len(text) + [1] * len(other))
    for length in (68, 65, 64, 63, 17, 1, 0):
        session.copy(0, 1, length)
        assert session.length(1) == length
        rest = text[length:]
        if rest:
            assert np.array_equal(session.forward(rest, [1] * len(rest), True), expected[length:]), length
    assert session.length(0) == len(text)
    session.copy(0, 0, 66)
    assert session.length(0) == 66
    assert np.array_equal(session.forward(text[66:], all_logits=True), expected[66:])


def test_what_cannot_be_copied_or_released_is_one_clear_error(pairs: Artifact) -> None:
    session = NativeSession(NativeModel(pairs, 1), slots=2)
    session.forward([1, 2, 3])
    for source, target, length, words in (
        (0, 1, 4, "slot 0 has no 4 tokens"),
        (0, 1, -1, "slot 0 has no -1 tokens"),
        (2, 1, 0, "slot 2"),
        (-1, 1, 0, "slot -1"),
        (0, 2, 1, "slot 2 is not one of 2"),
        (0, -1, 1, "slot -1 is not one of 2"),
    ):
        with pytest.raises(UserError, match=words):
            session.copy(source, target, length)
    for slot in (2, -1):
        with pytest.raises(UserError, match=f"slot {slot} is not one of 2"):
            session.release(slot)
    for slot, tokens in ((2, 1), (0, PAIRS.block_size + 1), (0, -1)):
        with pytest.raises(UserError, match=f"slot {slot} has no {tokens} positions"):
            session.touch(slot, tokens)
    assert [session.length(slot) for slot in range(2)] == [3, 0]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_released_slot_gives_its_memory_back_and_unused_slots_take_none(long: Artifact) -> None:
    model = NativeModel(long, TWO_THREADS)
    text = text_of(1000)
    alone = NativeSession(model, cache="fp32").forward(text[:40])
    start = resident_bytes()
    session = NativeSession(model, slots=64, cache="fp32")
    assert session.cache_bytes_per_token == 4 * 2 * 128 * 4  # layers, keys and values, channels, bytes
    slot_bytes = session.cache_bytes_per_token * LONG.block_size
    session.forward(text)
    assert resident_bytes() - start < 4 * slot_bytes  # 64 would be 268 MB; scratch is among them
    filled = resident_bytes()
    for slot in range(1, 9):
        session.copy(0, slot, len(text))
    assert resident_bytes() - filled > 7 * slot_bytes
    full = resident_bytes()
    for slot in range(1, 9):
        session.release(slot)
    assert full - resident_bytes() > 7 * slot_bytes
    assert session.length(1) == 0
    empty = resident_bytes()
    session.touch(1, LONG.block_size // 2)
    assert 0.4 * slot_bytes < resident_bytes() - empty < 0.9 * slot_bytes
    session.touch(0, LONG.block_size)  # what a slot holds stays
    assert session.length(0) == len(text)
    assert np.array_equal(
        session.forward([text[0]]), NativeSession(model, cache="fp32").forward([*text, text[0]])
    )
    assert np.array_equal(session.forward(text[:40], [1] * 40), alone)


def test_a_length_can_be_read_while_a_step_runs(long: Artifact) -> None:
    session, seen = NativeSession(NativeModel(long, 1)), set()
    step = threading.Thread(target=session.forward, args=(text_of(LONG.block_size),), daemon=True)
    step.start()
    end = time.monotonic() + SECONDS
    while step.is_alive() and time.monotonic() < end:
        seen.add(session.length())
    join(step)
    assert seen & {256, 512, 768}  # between two chunks of one call
    assert session.length() == LONG.block_size


# ---- mixed chunks


@pytest.mark.parametrize("cache", ["fp16", "int8"])
@pytest.mark.parametrize("shape", ["pairs", "odd"])
def test_prompts_in_pieces_among_running_texts_give_the_logits_of_each_alone(
    shape: str, cache: CacheKind, request: pytest.FixtureRequest
) -> None:
    """Texts come and go at random; a step takes one token of some and any number of others, wanted or not."""
    draw = np.random.default_rng(5)
    model = NativeModel(request.getfixturevalue(shape), TWO_THREADS)
    texts = [text_of(int(draw.integers(1, 71)), seed) for seed in range(24)]
    expected = [NativeSession(model, cache=cache).forward(text, all_logits=True) for text in texts]
    session = NativeSession(model, slots=5, cache=cache)
    waiting = list(range(len(texts)))
    running: dict[int, list[int]] = {}  # slot -> text, tokens taken
    checked = steps_of_many = 0
    while waiting or running:
        for slot in range(session.slots):
            if slot not in running and waiting and draw.random() < 0.5:
                running[slot] = [waiting.pop(), 0]
                session.truncate(0, slot)
        if not running:
            continue
        tokens: list[int] = []
        slots: list[int] = []
        rows: list[np.ndarray] = []
        for slot in draw.permutation(list(running)).tolist():
            index, taken = running[slot]
            count = min(len(texts[index]) - taken, 1 if draw.random() < 0.4 else int(draw.integers(1, 45)))
            tokens += texts[index][taken : taken + count]
            slots += [slot] * count
            rows += list(expected[index][taken : taken + count])
            running[slot][1] += count
            if running[slot][1] == len(texts[index]) or draw.random() < 0.02:
                del running[slot]
        wanted = draw.random(len(tokens)) < draw.choice([0.0, 0.1, 1.0])
        logits = session.forward(tokens, slots, wanted=wanted)
        assert logits.shape == (wanted.sum(), 300)
        assert all(np.array_equal(a, rows[b]) for a, b in zip(logits, np.flatnonzero(wanted), strict=True))
        checked += len(logits)
        steps_of_many += len(set(slots)) > 1 and len(tokens) > len(set(slots))
    assert checked > 200
    assert steps_of_many > 10


def test_no_head_is_computed_where_no_row_is_wanted(folder: Path) -> None:
    """A head whose logits overflow: whoever computes one of them finds out."""
    artifact = artifact_of(dataclasses.replace(PAIRS, tied=False), folder / "broken")
    tensors = {name: tensor.copy() for name, tensor in artifact.tensors.items()}
    tensors["lm_head.weight_scale"][:] = 3e38
    session = NativeSession(NativeModel(dataclasses.replace(artifact, tensors=tensors), 1))
    assert session.greedy([1, 2, 3], wanted=np.zeros(3, bool)).shape == (0,)
    assert session.forward([4], wanted=np.zeros(1, bool)).shape == (0, 300)
    assert session.length() == 4
    with pytest.raises(UserError, match="NaN or infinity"):
        session.greedy([1, 2, 3], wanted=np.array([False, True, False]))
    with pytest.raises(ValueError, match="wanted"):
        session.forward([1, 2], wanted=np.ones(3, bool))


# ---- rows of logits, reduced


@pytest.fixture(scope="module", params=[50_257, 300, 65, 64, 1])
def rows(request: pytest.FixtureRequest) -> np.ndarray:
    draw = np.random.default_rng(3)
    logits = draw.normal(0, 3, (4, request.param)).astype(np.float32)
    logits[1] = np.round(logits[1])  # many are equal
    logits[2, draw.integers(request.param)] = 60.0  # one stands out
    return logits


@pytest.mark.parametrize("isa", instruction_sets())
def test_reduced_rows_are_numpy_s(isa: str, rows: np.ndarray, pairs: Artifact) -> None:
    session = NativeSession(NativeModel(pairs, TWO_THREADS, isa))
    best = NativeSession(NativeModel(pairs, 1))
    for temperatures in ([0.8, 1.0, 0.05, 5.0], [1e-310, 1e3, 5e-324, 1e-2]):
        for count in (1, 20, 64, 1000, rows.shape[1]):
            found = session.top(rows, temperatures, count)
            for row, temperature, top, first in zip(
                rows, temperatures, found, best.top(rows, temperatures, count), strict=True
            ):
                expected = top_of_row(row, temperature, count)
                assert top is not None
                assert first is not None
                used = np.isfinite(expected.scaled)  # others can't be drawn
                assert np.array_equal(top.ids[used], expected.ids[used])
                assert np.array_equal(top.scaled[used], expected.scaled[used])
                assert top.total == pytest.approx(expected.total, rel=LAST_BITS, abs=0)
                assert top.total == first.total  # whatever instruction set and threads
                (alone,) = session.top(row[None], [temperature], count)
                assert alone is not None
                assert alone.total == top.total  # and whoever is beside it


def test_a_row_that_is_not_finite_is_told_and_spoils_no_other(pairs: Artifact) -> None:
    session = NativeSession(NativeModel(pairs, 1))
    logits = np.random.default_rng(0).normal(size=(4, 4500)).astype(np.float32)
    for row, column, value in ((0, 4499, np.nan), (1, 0, np.inf), (3, 100, -np.inf)):
        logits[row, column] = value
    found = session.top(logits, [1.0] * 4, 64)
    assert [top is None for top in found] == [True, True, False, True]
    for sampling in (Sampling(0.0), Sampling(1.0)):
        drawn = session.draw(logits, [sampling] * 4, [0.5] * 4)
        assert [token is None for token in drawn] == [True, True, False, True]
    for temperature in (0.0, -1.0, np.nan):
        with pytest.raises(UserError, match="is not positive"):
            session.top(logits[:1], [temperature], 64)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.8),
        Sampling(1.3, top_p=0.9),
        Sampling(0.9, top_k=40),
        Sampling(1.0, top_k=100),
        Sampling(1.0, top_k=7, top_p=0.5),
        Sampling(0.7, min_p=0.05),
        Sampling(2.0, min_p=0.001),
        Sampling(0.0),
    ],
    ids=str,
)
def test_the_engine_draws_the_tokens_that_numpy_draws(sampling: Sampling, pairs: Artifact) -> None:
    session, draws = NativeSession(NativeModel(pairs, TWO_THREADS)), 1000
    logits = np.random.default_rng(9).normal(0, 2.5, (draws, 1000)).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # many are equal
    logits[::7] *= 8  # few are likely
    sampler = Sampler(sampling)
    uniforms = [0.0, 1 - 2.0**-53, *(sampler.next_uniform() for _ in range(draws - 2))]
    drawn = session.draw(logits, [sampling] * draws, uniforms)
    assert drawn == draws_in_numpy(logits, [sampling] * draws, uniforms)


@pytest.mark.parametrize("isa", instruction_sets())
def test_tokens_do_not_depend_on_the_processor_nor_on_other_rows(
    isa: str, rows: np.ndarray, pairs: Artifact
) -> None:
    session = NativeSession(NativeModel(pairs, TWO_THREADS, isa))
    best = NativeSession(NativeModel(pairs, 1))
    random = np.random.default_rng(1)
    samplings = [Sampling(0.7), Sampling(1.2, top_p=0.8), Sampling(5e-324), Sampling(1e6, top_k=10**12)]
    for _ in range(50):
        uniforms = random.random(len(rows)).tolist()
        drawn = session.draw(rows, samplings, uniforms)
        assert drawn == best.draw(rows, samplings, uniforms) == draws_in_numpy(rows, samplings, uniforms)
        alone = [
            session.draw(row[None], [sampling], [uniform])
            for row, sampling, uniform in zip(rows, samplings, uniforms, strict=True)
        ]
        assert drawn == [token for tokens in alone for token in tokens]


# ---- threads


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_models_share_their_threads(pairs: Artifact, odd: Artifact) -> None:
    """Two models at work, and one that is loaded meanwhile: each gives what it gives alone."""
    models = [NativeModel(artifact, TWO_THREADS) for artifact in (pairs, odd)]
    threads = len(os.listdir("/proc/self/task"))
    text = text_of(60)
    expected = [NativeSession(model).forward(text) for model in models]
    wrong: list[int] = []

    def work(which: int) -> None:
        session = NativeSession(models[which])
        for _ in range(20):
            session.truncate(0)
            if not np.array_equal(session.forward(text), expected[which]):
                wrong.append(which)

    workers = [threading.Thread(target=work, args=(which,), daemon=True) for which in (0, 1)]
    for worker in workers:
        worker.start()
    for _ in range(10):
        assert np.array_equal(NativeSession(NativeModel(odd, TWO_THREADS)).forward(text), expected[1])
    join(*workers)
    assert not wrong
    # A joined thread's task may be there a moment longer.
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= threads, "the end of all other threads")


FORKED = """
import os, sys
from pathlib import Path
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.native.native_model import NativeModel
from jaxgpt_export.native.native_session import NativeSession
artifact = read_artifact(Path(sys.argv[1]))
model = NativeModel(artifact, 2)
expected = NativeSession(model).forward([1, 2, 3]).tobytes()
child = os.fork()
if not child:
    same = NativeSession(NativeModel(artifact, 2)).forward([1, 2, 3]).tobytes() == expected
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_gets_threads_of_its_own(pairs: Artifact) -> None:
    command, environment = python(FORKED)
    done = subprocess.run(
        [*command, str(pairs.folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "0", done.stderr


def test_no_random_number_draws_what_min_p_leaves_out(pairs: Artifact) -> None:
    """Close to 1 its product with the kept weights rounds to their sum."""
    session, draws = NativeSession(NativeModel(pairs, 1)), 2000
    logits = np.random.default_rng(2).normal(0, 1.5, (draws, 300)).astype(np.float32)
    drawn = session.draw(logits, [Sampling(1.0, min_p=0.05)] * draws, [1 - 2.0**-53] * draws)
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    assert min(weights[row, token] for row, token in enumerate(drawn)) >= 0.05
