"""Every gate on the distance from a probe trips, alone, when what it watches is wrong, and `verify` fails."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from jaxgpt_export.format.artifact import Artifact, read_artifact
from jaxgpt_export.format.certificate import write_certificate
from jaxgpt_export.format.probe import Probe, read_probe, write_probe
from jaxgpt_export.format.scheme import Quantization
from jaxgpt_export.model.build import build_model
from jaxgpt_export.parity.metrics import Parity
from jaxgpt_export.parity.probe_gates import (
    FP32_LOGIT_SIZE,
    INT8_KL_FACTOR,
    INT8_KL_SLACK,
    INT8_TOP1_SLACK,
    MAX_FP32_LOGIT_DIFF,
    fp32_bound,
    parity_gates,
    probe_logits,
)
from safetensors.torch import load_file, save_file
from tiny_artifacts import tiny_artifacts

from jaxgpt.shared.config import ModelConfig

CONFIG = ModelConfig(vocab_size=97, block_size=24, n_layer=1, n_head=2, n_embd=8)
FLOAT = Artifact(Path("none"), CONFIG, None, {})
INT8 = Artifact(Path("none"), CONFIG, Quantization("int8-dynamic", {}), {})
PARITY = Parity(
    max_abs_logit_diff=0.2, mean_abs_logit_diff=0.1, kl_mean=2e-3, kl_max=3e-2, top1_agreement=0.9
)
BEYOND = 1.001  # just past a gate's edge, and far beyond float64's rounding


def failed(certified: dict[str, Any], parity: Parity = PARITY, artifact: Artifact = INT8) -> list[str]:
    certificate = {"parity": {**dataclasses.asdict(PARITY), **certified}}
    gates = parity_gates(artifact, parity, certificate, MAX_FP32_LOGIT_DIFF)
    return [text for text, passed in gates.items() if not passed]


def larger(value: float) -> float:
    """Return the largest figure that a gate allows for another."""
    return INT8_KL_FACTOR * value + INT8_KL_SLACK


def test_what_was_certified_passes_every_gate() -> None:
    assert failed({}) == []


@pytest.mark.parametrize("name", ["kl_mean", "kl_max"])
def test_kl_beyond_what_was_certified_fails_its_gate_alone(name: str) -> None:
    edge = larger(getattr(PARITY, name))
    assert failed({}, dataclasses.replace(PARITY, **{name: edge / BEYOND})) == []
    (text,) = failed({}, dataclasses.replace(PARITY, **{name: edge * BEYOND}))
    assert text.startswith("KL from Flax fp32: " + name.removeprefix("kl_"))


@pytest.mark.parametrize("name", ["kl_mean", "kl_max"])
def test_certified_kl_beyond_what_is_measured_fails_its_gate_alone(name: str) -> None:
    edge = larger(getattr(PARITY, name))
    assert failed({name: edge / BEYOND}) == []
    (text,) = failed({name: edge * BEYOND})
    assert text.startswith("certified KL " + name.removeprefix("kl_"))


@pytest.mark.parametrize("name", ["kl_mean", "kl_max"])
def test_a_kl_of_fifty_nats_fails_whatever_was_certified(name: str) -> None:
    """Too small a certified figure fails one gate, too large a one the other; the right one passes both."""
    parity = dataclasses.replace(PARITY, **{name: 50.0})
    for certified in (1e9, 100.0, 30.0, 2e-3, 0.0):
        assert len(failed({name: certified}, parity)) == 1, certified
    assert failed({name: 50.0}, parity) == []


def test_top1_agreement_below_what_was_certified_fails_its_gate_alone() -> None:
    edge = PARITY.top1_agreement - INT8_TOP1_SLACK
    assert failed({}, dataclasses.replace(PARITY, top1_agreement=edge * BEYOND)) == []
    (text,) = failed({}, dataclasses.replace(PARITY, top1_agreement=edge / BEYOND))
    assert text.startswith("top-1 agreement")


def test_certified_top1_agreement_below_what_is_measured_fails() -> None:
    edge = PARITY.top1_agreement - INT8_TOP1_SLACK
    assert failed({"top1_agreement": edge * BEYOND}) == []
    assert len(failed({"top1_agreement": edge / BEYOND})) == 1


def test_float32_gate_is_the_bound_on_the_largest_difference_of_a_logit() -> None:
    within = dataclasses.replace(PARITY, max_abs_logit_diff=MAX_FP32_LOGIT_DIFF)
    beyond = dataclasses.replace(PARITY, max_abs_logit_diff=MAX_FP32_LOGIT_DIFF * BEYOND)
    assert failed({}, within, FLOAT) == []
    (text,) = failed({"max_abs_logit_diff": 1e9}, beyond, FLOAT)  # what was certified is no excuse
    assert text.startswith("logits against Flax fp32: max abs difference")


def test_the_source_of_the_logits_is_named_in_every_gate_on_them() -> None:
    certificate = {"parity": {**dataclasses.asdict(PARITY), "against": "transformers"}}
    for artifact, count in ((FLOAT, 1), (INT8, 3)):
        gates = parity_gates(artifact, PARITY, certificate, MAX_FP32_LOGIT_DIFF)
        assert sum("transformers" in text for text in gates) == count


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_artifacts(tmp_path_factory.mktemp("tiny"))


def test_float32_bound_grows_with_the_largest_logit_of_either_sign_from_size_ten_on(
    artifacts: dict[str, Path],
) -> None:
    probe = read_probe(read_artifact(artifacts["fp32"]))

    def bound(largest: float) -> float:
        logits = probe.logits * 0
        logits[0, 0], logits[-1, -1] = largest, -largest / 2
        return fp32_bound(dataclasses.replace(probe, logits=logits))

    assert bound(0.0) == bound(9.0) == bound(-10.0) == MAX_FP32_LOGIT_DIFF
    for size in (20.0, -20.0, 5000.0):
        assert bound(size) == pytest.approx(MAX_FP32_LOGIT_DIFF * abs(size) / FP32_LOGIT_SIZE, rel=1e-6)


def copy(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy an artifact with a changed certificate, which nothing signs."""
    shutil.copytree(source, folder)
    path = folder / "certificate.json"
    certificate = json.loads(path.read_text())
    change(certificate)
    path.write_text(json.dumps(certificate))
    return folder


def verify(command: Command, folder: Path, *more: object) -> tuple[int, list[str]]:
    """Return the exit code and the gates that failed."""
    code, out, err = command("jaxgpt-export", "verify", "--artifact", folder, "--json", *more)
    assert code in (0, 1), err
    gates = json.loads(out)["gates"]
    lines = [line.removeprefix("FAIL  ") for line in err.splitlines() if line.startswith("FAIL  ")]
    assert lines == [text for text, passed in gates.items() if not passed]
    return code, lines


FIGURES = {  # a certified figure that no measurement fits -> the gate that says so
    ("kl_mean", 1e9): "certified KL mean",
    ("kl_max", 1e9): "certified KL max",
    ("top1_agreement", -1.0): "certified KL mean",  # one gate for both
    ("kl_mean", -1.0): "KL from",
    ("kl_max", -1.0): "KL from",
    ("top1_agreement", 2.0): "top-1 agreement",
}


@pytest.mark.parametrize(("name", "value"), FIGURES)
@pytest.mark.parametrize("kind", ["int8-dynamic", "int8-static", "int4-weight-only"])
def test_verify_leaves_with_1_for_each_certified_figure_that_does_not_fit(
    command: Command, artifacts: dict[str, Path], tmp_path: Path, kind: str, name: str, value: float
) -> None:
    assert verify(command, artifacts[kind]) == (0, [])
    folder = copy(artifacts[kind], tmp_path / "a", lambda c: c["parity"].update({name: value}))
    code, (text,) = verify(command, folder)
    assert code == 1
    assert text.startswith(FIGURES[name, value])


def test_verify_leaves_with_1_for_a_certificate_of_another_kind(
    command: Command, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy(artifacts["int8-dynamic"], tmp_path / "a", lambda c: c.update(kind="int8-static"))
    assert verify(command, folder) == (1, ["kind is int8-static"])


def test_verify_leaves_with_1_for_a_file_that_is_not_the_certified_one(
    command: Command, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy(artifacts["fp32"], tmp_path / "a", lambda c: c["files"].update({"merges.txt": "0" * 64}))
    assert verify(command, folder) == (1, ["files are the certified ones"])


def signed(source: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """Copy an artifact, change its files, and certify them: hashes fit, only logits can tell."""
    shutil.copytree(source, folder)
    change(folder)
    certificate = json.loads((folder / "certificate.json").read_text())
    figures = {key: value for key, value in certificate.items() if key not in ("kind", "origin", "files")}
    write_certificate(folder, certificate["kind"], certificate["origin"], figures)
    return folder


@pytest.mark.parametrize("factor", [1 / BEYOND, 2.0])
def test_verify_leaves_with_1_for_float32_logits_beyond_their_bound(
    command: Command, artifacts: dict[str, Path], tmp_path: Path, factor: float
) -> None:
    def change(folder: Path) -> None:
        artifact = read_artifact(folder)
        probe, logits = read_probe(artifact), probe_logits(build_model(artifact), read_probe(artifact))
        moved = logits.numpy() + 0
        moved[0, 0] += factor * fp32_bound(probe)
        write_probe(folder, Probe(probe.tokens, probe.positions, moved))

    code, lines = verify(command, signed(artifacts["fp32"], tmp_path / "a", change))
    assert code == (factor > 1)
    assert all(line.startswith("logits against") for line in lines)
    assert len(lines) == code


def test_verify_leaves_with_1_when_the_run_computes_other_logits_than_the_probe_holds(
    command: Command, fp32: Path, run: Path, tmp_path: Path
) -> None:
    """Weights that are not the run's, with a probe that fits them: only the run itself can tell."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["transformer.ln_f.bias"] += torch.linspace(-0.01, 0.01, 32)
        save_file(tensors, path, metadata={"format": "pt"})
        artifact = read_artifact(folder)
        probe = read_probe(artifact)
        logits = probe_logits(build_model(artifact), probe).numpy()
        write_probe(folder, Probe(probe.tokens, probe.positions, logits))

    folder = signed(fp32, tmp_path / "a", change)
    assert verify(command, folder) == (0, [])
    code, (text,) = verify(command, folder, "--run", run)
    assert code == 1
    assert text.startswith("Flax logits of the run")
