"""What stands behind a row of `jaxgpt-bench quality`: who computes it, and how sure its figures are."""

import dataclasses
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxgpt_bench.peers.peer import Program
from jaxgpt_bench.quality import measure
from jaxgpt_bench.quality.contestants import ComparedModel, computed, engine_is_exact
from jaxgpt_bench.quality.samples import sample_texts
from jaxgpt_bench.quality.statistics import change_figures, mean_error, quantile_error, root_mean_square
from jaxgpt_bench.speed.random_models import placeholder_tokenizer
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.scheme import FLOAT32, Quantization
from jaxgpt_export.generation.torch_session import TorchSession
from jaxgpt_export.model.build import build_model
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.native.native_session import NativeSession
from jaxgpt_export.parity.quality import measure_quality
from rich.console import Console
from tiny_artifacts import SHAPE, tiny_artifacts

from jaxgpt.shared.errors import UserError

needs_engine = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")
EXACT = ("int8-dynamic", "int8-static")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_artifacts(tmp_path_factory.mktemp("quality"))


@needs_engine
@pytest.mark.parametrize("kind", EXACT)
def test_the_engine_gives_the_module_s_logits_and_samples_to_the_bit(
    kind: str, folders: dict[str, Path]
) -> None:
    artifact = read_artifact(folders[kind])
    module = build_model(artifact)
    forward, session = computed(artifact)
    assert isinstance(session, NativeSession)
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for rows, length in ((3, SHAPE.block_size), (2, 7), (1, 1)):
            tokens = torch.randint(SHAPE.vocab_size, (rows, length), generator=draw)
            assert torch.equal(forward(tokens), module(tokens))
    tokenizer, prompts = placeholder_tokenizer(SHAPE.vocab_size), ["a b", "c"]
    texts = [list(sample_texts(each, tokenizer, prompts, 12)) for each in (session, TorchSession(module))]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["fp32", "int8-weight-only", "int4-weight-only"])
def test_what_the_engine_computes_otherwise_stays_with_the_module(
    kind: str, folders: dict[str, Path]
) -> None:
    assert isinstance(computed(read_artifact(folders[kind]))[1], TorchSession)


def test_one_layer_in_floats_is_enough_for_the_module(folders: dict[str, Path]) -> None:
    artifact = read_artifact(folders["int8-dynamic"])
    assert artifact.quantization is not None
    assert engine_is_exact(artifact)
    layers = {**artifact.quantization.layers, "h.1.mlp.c_fc": FLOAT32}
    mixed = dataclasses.replace(artifact, quantization=Quantization("int8-dynamic", layers))
    assert not engine_is_exact(mixed)


class Counting:
    """A session whose logits tell what it was given, in one buffer that it writes over."""

    block_size = 9

    def __init__(self) -> None:
        self._taken: list[int] = []
        self._buffer = np.zeros(3, np.float32)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        self._taken = list(tokens)
        return self._logits()

    def decode(self, token: int) -> np.ndarray:
        self._taken.append(token)
        return self._logits()

    def _logits(self) -> np.ndarray:
        self._buffer[:] = (len(self._taken), self._taken[-1], sum(self._taken))
        return self._buffer


def test_a_program_takes_a_text_token_by_token() -> None:
    session = Counting()
    for _ in range(2):  # the second text begins anew
        logits = Program().text_logits(session, [5, 2, 4])
        assert logits.tolist() == [[1, 5, 5], [2, 2, 7], [3, 4, 11]]


def test_errors_over_windows_are_the_standard_error_of_their_means() -> None:
    """Windows of equal length: the textbook's standard error of a mean of W numbers."""
    values = np.random.default_rng(0).normal(size=(6, 5)) + np.arange(6)[:, None]
    means = values.mean(axis=1)
    expected = statistics.stdev(means) / 6**0.5
    assert mean_error(values.ravel(), [5] * 6) == pytest.approx(expected, rel=1e-12)
    assert mean_error(values.ravel(), [5, 5, 0, 5, 5, 5, 5, 0]) == pytest.approx(expected, rel=1e-12)
    root, error = root_mean_square(values.ravel(), [5] * 6)
    assert root == pytest.approx(np.sqrt((values**2).mean()), rel=1e-12)
    assert error == pytest.approx(statistics.stdev((values**2).mean(axis=1)) / 6**0.5 / (2 * root), rel=1e-12)
    assert root_mean_square(np.zeros(4), [2, 2]) == (0.0, 0.0)
    assert mean_error(values[0], [5]) is None


def test_the_error_of_a_quantile_takes_windows_whole() -> None:
    """Independent positions: p (1 - p) / (n density^2), of uniform numbers; more of equal ones."""
    draw = np.random.default_rng(1)
    alone = draw.uniform(size=4000)
    error = quantile_error(alone, [10] * 400, 0.9)
    assert error == pytest.approx((0.9 * 0.1 / 4000) ** 0.5, rel=0.2)
    alike = np.repeat(draw.uniform(size=400), 10)
    clustered = quantile_error(alike, [10] * 400, 0.9)
    assert error is not None
    assert clustered is not None
    assert clustered > 2 * error
    assert quantile_error(alone[:10], [10], 0.9) is None
    assert quantile_error(alone[:10], [10, 0], 0.9) is None
    assert quantile_error(np.zeros(4), [3, 1], 0.9) == 0


def test_changes_are_those_of_the_right_token_against_the_first_model() -> None:
    """Written out from the definitions, positions without a target left out."""
    draw = torch.Generator().manual_seed(0)
    tables = {name: torch.randn(5, 5, generator=draw) for name in ("reference", "other")}
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    targets = torch.tensor([[1, 2, 3], [-1, 0, -1]])
    found = measure_quality({n: t.__getitem__ for n, t in tables.items()}, [(tokens, targets)])
    p, q = (torch.softmax(table.double(), dim=-1)[[0, 1, 2, 4]].numpy() for table in tables.values())
    right = [1, 2, 3, 0]
    kl = (p * np.log(p / q)).sum(axis=1)
    change = q[range(4), right] - p[range(4), right]
    figures = change_figures(found["other"])
    assert change_figures(found["reference"]) is None
    assert figures is not None
    assert figures.rms_probability_change == pytest.approx(np.sqrt((change**2).mean()), rel=1e-9)
    high, higher = sorted(kl)[-2:]
    assert figures.kl_p999 == pytest.approx(high + 0.997 * (higher - high), rel=1e-9)  # 0.999 x 3 of 4
    sums = np.array([kl[:3].sum(), kl[3]]) - kl.mean() * np.array([3, 1])
    assert figures.kl_mean_error == pytest.approx(np.sqrt(2 * (sums**2).sum()) / 4, rel=1e-9)


def test_a_model_that_fails_late_is_left_out_and_the_others_are_as_without_it() -> None:
    draw = torch.Generator().manual_seed(0)
    tables = {name: torch.randn(5, 5, generator=draw) for name in ("first", "dies", "nan", "last")}
    good = {name: table.__getitem__ for name, table in tables.items()}
    parts = [(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 3]])), (torch.tensor([[3, 4, 0]]),) * 2]

    def dies(tokens: torch.Tensor) -> torch.Tensor:
        if tokens[0, 0] == 3:
            raise UserError("it stopped with code 1")
        return tables["dies"][tokens]

    tables["nan"][4] = torch.nan  # in the second window
    models = {**good, "dies": dies}
    left_out: dict[str, str] = {}
    found = measure_quality(models, parts, left_out=left_out)
    assert list(found) == ["first", "last"]
    assert found == measure_quality({name: good[name] for name in ("first", "last")}, parts)
    assert left_out.pop("nan").startswith("logits hold NaN")
    assert left_out == {"dies": "it stopped with code 1"}
    for asked in ({"dies": dies, "last": good["last"]}, {"first": good["first"], "nan": good["nan"]}):
        with pytest.raises(UserError):
            measure_quality(asked, parts, left_out={} if "dies" in asked else None)
    with pytest.raises(UserError, match="code 1"):
        measure_quality(models, parts, {"last": "dies"}, {})  # a parent


def test_progress_names_the_model_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(measure, "stderr", Console(file=shown, force_terminal=True, width=100))
    table = torch.eye(4)
    models = [ComparedModel(name, table.__getitem__, None, 0.0) for name in ("first", "second")]
    inputs, targets = np.zeros((9, 2), np.int32), np.ones((9, 2), np.int32)
    measure.measured_on(models, inputs, targets)
    assert "measuring second" in shown.getvalue()
    assert "4/4" in shown.getvalue()  # two models, two batches of eight windows
