"""A token whose stream overflows: texts that hold it are refused by the native engine, and no others."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from jaxgpt_bench.speed.random_models import placeholder_tokenizer
from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.native.native_model import NativeModel
from jaxgpt_export.native.native_session import CacheKind, NativeSession
from test_export_engine import CONFIG, PAIRS, WIDE, artifact_of, writable

from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.scheduling.scheduler import Scheduler, Text
from jaxgpt.generation.state import GenerationState
from jaxgpt.shared.errors import UserError

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")

BAD = 7
# Longer than the rows that one piece of attention takes, and no multiple of the four that it takes at a time.
TEXT = [token + (token >= BAD) for token in np.random.default_rng(0).integers(299, size=50).tolist()]
CACHES = pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])


@pytest.fixture(scope="module", params=["odd", "pairs"])
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Heads across tiles, and heads that fill them: c_attn and attention are two loops, or one."""
    config = {"odd": dataclasses.replace(CONFIG, tied=False), "pairs": PAIRS}[request.param]
    folder: Path = tmp_path_factory.mktemp("engine") / "damaged"
    artifact = writable(artifact_of("int8-dynamic", config, folder))
    artifact.tensors["wte.weight_scale"][BAD] = 3e38
    return artifact


@CACHES
@pytest.mark.parametrize("isa", instruction_sets())
def test_rows_that_hold_it_are_nan_and_those_before_it_keep_their_bits(
    damaged: Artifact, isa: str, cache: CacheKind
) -> None:
    model = NativeModel(damaged, 1, isa)
    whole = NativeSession(model, 1, cache).forward(TEXT, all_logits=True)
    assert np.isfinite(whole).all()
    for rows in (1, 6, 25, len(TEXT)):
        for at in (0, 1, 2, 3, 21, 40):
            session = NativeSession(model, 1, cache)
            text = [*TEXT[:at], BAD, *TEXT[at + 1 :]]
            parts = [text[first : first + rows] for first in range(0, len(text), rows)]
            logits = np.concatenate([session.forward(part, all_logits=True) for part in parts])
            assert np.array_equal(logits[:at], whole[:at])
            assert np.isnan(logits[at:]).all()
            session.truncate(at)  # what lies behind is of no text
            assert np.array_equal(session.forward(TEXT[at:], all_logits=True), whole[at:])


@CACHES
def test_after_an_error_every_slot_holds_what_it_held(damaged: Artifact, cache: CacheKind) -> None:
    model = NativeModel(damaged, 1)
    session, other = NativeSession(model, 6, cache), NativeSession(model, 6, cache)
    for each in (session, other):
        each.forward([1, 2, 3], [0, 0, 1])
    with pytest.raises(UserError, match="logits hold NaN or infinity"):
        session.greedy([4, BAD, 5], [0, 0, 1])
    assert [session.length(slot) for slot in range(3)] == [2, 1, 0]
    assert session.greedy([4, 5], [0, 1]).tolist() == other.greedy([4, 5], [0, 1]).tolist()
    slots = np.repeat(np.arange(6), 50)  # two chunks of rows, the damaged one in the second
    with pytest.raises(UserError, match="logits hold NaN or infinity"):
        session.greedy([*TEXT * 5, BAD, *TEXT[1:]], slots.tolist())
    assert [session.length(slot) for slot in range(6)] == [3, 2, 0, 0, 0, 0]


@CACHES
def test_greedy_texts_beside_one_that_holds_it_go_on(damaged: Artifact, cache: CacheKind) -> None:
    model, tokenizer = NativeModel(damaged, 1), placeholder_tokenizer(300)

    def generated(prompts: list[tuple[int, ...]]) -> list[Text]:
        scheduler = Scheduler(NativeSession(model, 3, cache))
        texts = [Text(GenerationState(tokenizer, prompt, 70, 12, Sampling(0.0))) for prompt in prompts]
        for text in texts:
            scheduler.submit(text)
        while scheduler.busy:
            scheduler.step()
        return texts

    good = [(1, 2, 3), (4, 5)]
    alone = [text.state.tokens for prompt in good for text in generated([prompt])]
    first, bad, second = generated([good[0], (9, BAD, 8), good[1]])
    assert (first.error, second.error) == (None, None)
    assert [first.state.tokens, second.state.tokens] == alone
    assert isinstance(bad.error, UserError)
    assert "logits hold NaN or infinity" in str(bad.error)


@pytest.mark.parametrize("broken", ["int8-dynamic", "int8-static", "int4-dynamic-head", "fp32"])
def test_a_stream_that_overflows_is_said_and_never_a_text(broken: str, tmp_path: Path) -> None:
    """Integers hide infinity: the scale of such a row tells it on to the logits."""
    artifact = writable(artifact_of(broken, WIDE, tmp_path / "a"))
    layer = "h.0.mlp.c_fc.weight"
    artifact.tensors[layer if broken == "fp32" else f"{layer}_scale"][:] = 3e38
    for isa in instruction_sets():
        session = NativeSession(NativeModel(artifact, 1, isa))
        assert np.isnan(session.prefill([1, 2, 3])).all(), isa
        with pytest.raises(UserError, match="NaN or infinity"):
            session.greedy([4])
