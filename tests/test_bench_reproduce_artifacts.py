"""Artifacts of a reproduction are kept only where they would be made the same again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_TRAIN
from jaxgpt_bench.reproduce import artifacts, training_run
from jaxgpt_bench.reproduce.stages import Stages, StoppedError
from jaxgpt_export.format.certificate import altered_files, read_certificate
from safetensors.numpy import load_file, save_file
from test_bench_reproduce import options_of

from jaxgpt.shared.console import Result
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.training.run import init_from

Change = Callable[[dict[str, np.ndarray]], object]


def of_another_training(artifact: Path, copy: Path, file: str, change: Change) -> Path:
    """Copy an artifact as a run of the same config.json, step and data with other weights would give it."""
    shutil.copytree(artifact, copy)
    tensors = load_file(copy / file)
    change(tensors)
    save_file(tensors, copy / file)
    path = copy / "certificate.json"
    certificate = json.loads(path.read_text())
    certificate["files"][file] = sha256_of(copy / file)
    path.write_text(json.dumps(certificate))
    assert altered_files(copy, read_certificate(copy)) == []
    return copy


def next_number(name: str) -> Change:
    """Change one number of a tensor by its last bit."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].flat[-1] = np.nextafter(tensors[name].flat[-1], np.float32(np.inf))

    return change


def test_what_was_made_of_a_run_that_was_trained_again_is_made_again(
    run: Path, fp32: Path, int8_dynamic: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change = next_number("transformer.ln_f.bias")
    out = of_another_training(fp32, tmp_path / "fp32", "model.safetensors", change)
    log, dataset = Stages(), open_dataset(data)

    def is_quantized_kept() -> bool:
        certificate = read_certificate(int8_dynamic)
        return artifacts.weights_sha256(out) == certificate["origin"]["parent_sha256"]

    assert not is_quantized_kept()
    artifacts.converted(log, out, run, dataset, {})
    said = " ".join(capfd.readouterr().err.split())
    assert "has other weights than the run, which was trained again" in said
    assert (out / "model.safetensors").read_bytes() == (fp32 / "model.safetensors").read_bytes()
    assert is_quantized_kept()
    artifacts.converted(log, out, run, dataset, {})
    assert [(entry.stage, entry.kept) for entry in log.log] == [("convert", False), ("convert", True)]


def test_an_artifact_that_does_not_hold_what_it_says_is_not_kept_by_the_next_call(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: object) -> Result:
        return Result({"gate": "logits"}, passed=False)

    out, dataset = tmp_path / "fp32", open_dataset(data)
    with monkeypatch.context() as changed:
        changed.setattr(artifacts, "verify", failed)
        with pytest.raises(StoppedError) as stop:
            artifacts.converted(Stages(), out, run, dataset, {})
    assert stop.value.result.figures == {"why": "a check failed", "gate": "logits", "stage": "convert"}
    assert not out.exists()
    log = Stages()
    artifacts.converted(log, out, run, dataset, {})
    assert not log.log[0].kept


def test_the_input_scales_of_a_training_with_rounding_are_weights_too(
    qat_run: Path, qat_fp32: Path, tmp_path: Path
) -> None:
    step = training_run.best_step(qat_run)
    assert artifacts.holds_weights_of(qat_fp32, qat_run, step)
    change = next_number("h.0.attn.c_attn.input_scale")
    other = of_another_training(qat_fp32, tmp_path / "other", "qat.safetensors", change)
    assert not artifacts.holds_weights_of(other, qat_run, step)


def test_a_training_on_from_a_run_that_was_trained_again_is_refused_with_what_helps(
    run: Path, qat_run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"preset": "tiny", **options_of(TINY_TRAIN), "max_steps": 10, "learning_rate": 0.001}
    settings |= {"init": run, "qat": True}
    log, dataset = Stages(), open_dataset(data)
    training_run.trained(log, "qat", qat_run, settings, dataset)
    assert log.log[0].kept
    read = init_from.InitSource.read

    def read_again(self: init_from.InitSource, model: object) -> object:
        params, entry = read(self, model)
        return params, {**entry, "params_sha256": "0" * 64}

    monkeypatch.setattr(init_from.InitSource, "read", read_again)
    with pytest.raises(UserError, match=f"init was run .*here: remove {qat_run}, and the same command"):
        training_run.trained(log, "qat", qat_run, settings, dataset)


@pytest.mark.parametrize(
    ("calibration", "kept"),
    [
        ({"observer": "nearest", "observers": {"gptq": {}, "nearest": {}}}, True),
        ({"observer": "nearest"}, False),
        ({"observer": "gptq"}, False),
        (None, True),  # a method that has nothing to choose
    ],
)
def test_an_artifact_is_kept_where_its_method_chose_whatever_that_was(
    int8_dynamic: Path, fp32: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    calibration: dict[str, object] | None, kept: bool,
) -> None:  # fmt: skip
    out = tmp_path / "artifact"
    shutil.copytree(int8_dynamic, out)
    certificate = read_certificate(out)
    del certificate["calibration"]
    more = {} if calibration is None else {"calibration": calibration}
    (out / "certificate.json").write_text(json.dumps({**certificate, **more}))
    log = Stages()
    made: list[object] = []

    def make(options: object) -> Result:
        made.append(options)
        return Result({})

    monkeypatch.setattr("jaxgpt_export.quantize.command.quantize", make)
    monkeypatch.setattr(artifacts, "verify", make)
    artifacts.quantized(log, out, "int8-dynamic", fp32, open_dataset(data))
    assert ([entry.kept for entry in log.log], len(made)) == ([kept], 0 if kept else 2)
