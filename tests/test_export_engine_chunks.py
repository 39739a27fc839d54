"""A call of more tokens than the native engine takes at once: in chunks, whose rows follow each other."""

import numpy as np
import pytest
import torch
from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.model.build import build_model
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.native.native_model import NativeModel
from jaxgpt_export.native.native_session import NativeSession
from test_export_engine_slots import LONG, TWO_THREADS, artifact_of, text_of

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")

TEXT = text_of(520)  # two chunks of 256 tokens and a part of a third
PIECES = ((0, 200), (200, 400), (400, 520))  # none of which is more than a chunk


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact_of(LONG, tmp_path_factory.mktemp("chunks") / "long")


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> NativeModel:
    return NativeModel(artifact, TWO_THREADS)


@pytest.fixture(scope="module")
def logits(model: NativeModel) -> np.ndarray:
    """Of every token, a piece at a time."""
    session = NativeSession(model, cache="fp32")
    return np.concatenate([session.forward(TEXT[a:b], all_logits=True) for a, b in PIECES])


def test_logits_of_all_tokens_are_those_of_pieces_and_of_the_module(
    model: NativeModel, artifact: Artifact, logits: np.ndarray
) -> None:
    assert np.array_equal(NativeSession(model, cache="fp32").forward(TEXT, all_logits=True), logits)
    module = build_model(artifact)
    assert module.exact
    with torch.inference_mode():
        assert np.array_equal(logits, module(torch.tensor([TEXT]))[0].numpy())


def test_most_likely_tokens_are_those_of_pieces_and_of_the_logits(
    model: NativeModel, logits: np.ndarray
) -> None:
    session = NativeSession(model, cache="fp32")
    best = np.concatenate([session.greedy(TEXT[a:b], all_logits=True) for a, b in PIECES])
    assert np.array_equal(best, logits.argmax(axis=1))
    assert np.array_equal(NativeSession(model, cache="fp32").greedy(TEXT, all_logits=True), best)


@pytest.mark.parametrize("places", [(0, 255, 256, 300, 511, 512, 519), (3, 4, 519), (256,), (100, 511)])
def test_wanted_rows_of_several_chunks_are_in_order(
    model: NativeModel, logits: np.ndarray, places: tuple[int, ...]
) -> None:
    """A chunk may want other numbers of rows than the ones before it, or none."""
    wanted, rows = np.zeros(len(TEXT), bool), list(places)
    wanted[rows] = True
    assert np.array_equal(NativeSession(model, cache="fp32").forward(TEXT, wanted=wanted), logits[rows])
    best = NativeSession(model, cache="fp32").greedy(TEXT, wanted=wanted)
    assert np.array_equal(best, logits[rows].argmax(axis=1))
