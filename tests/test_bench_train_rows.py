"""`jaxgpt-bench train` without PyTorch, in this process: variants, profile, turns, what is left out."""

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, assert_one_line_error, python, run_command
from jaxgpt_bench.common.rows import Spread
from jaxgpt_bench.common.step_rows import StepFigures
from jaxgpt_bench.profile import rates
from jaxgpt_bench.training import rounds, turns
from jaxgpt_bench.training.jaxgpt_trainer import JaxgptSteps
from jaxgpt_bench.training.trainer import Trainer, answering, environment
from jaxgpt_bench.training.variants import Variant, parse_variant

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.machine import SHARE_VARIABLES

SHAPE = ("--vocab-size", 1024, "--block-size", 64, "--n-layer", 1, "--n-head", 1, "--n-embd", 32)
SETTINGS = (
    "--batch-size",
    16,
    "--loss-chunks",
    2,
    "--optimizer",
    "adamw",
)  # test_bench_profile.py compiles it too
MODEL, TRAIN = ModelConfig(64, 16, 1, 1, 16), TrainConfig(batch_size=4)
FIRST = Variant("", MODEL, TRAIN)
GB = 1e9


class WorkerHere:
    """A trainer that answers in this process; one with a variant of 7 chunks finds no memory."""

    def __init__(self, name: str, module: str, order: dict[str, Any], environment: dict[str, str]) -> None:
        self.name = name
        if order["train"]["loss_chunks"] == 7:
            raise RuntimeError(f"{name} stopped: XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory")
        self._answer = answering(JaxgptSteps, order)

    def ask(self, question: dict[str, int]) -> dict[str, Any]:
        return {**json.loads(json.dumps(self._answer(question))), "peak_rss_bytes": 10**6}

    def close(self) -> None:
        pass


def test_variants_are_measured_in_the_same_rounds_and_profiled(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that changes nothing on a CPU has the same losses; one that stops is left out, and said."""
    monkeypatch.setattr(turns, "Worker", WorkerHere)
    monkeypatch.setattr(rounds, "PRODUCT_SIZE", 128)
    monkeypatch.setattr(rates, "PRODUCT_SIZE", {"cpu": 128})
    monkeypatch.setattr(rates, "COPY_BYTES", {"cpu": 2**20})
    more = (*SETTINGS, "--rounds", 2, "--steps", 2, "--alone", "--profile")
    variants = ("--variant", "flash=false", "--variant", "loss_chunks=7")
    out = tmp_path / "train.json"
    code, _, err = command("jaxgpt-bench", "train", "tiny", *SHAPE, *more, *variants, "--out", out)
    assert code == 0, err
    figures = StepFigures.from_json(json.loads(out.read_text()))
    first, again = figures.rows
    assert (first.name, again.name) == ("jaxgpt x1", "jaxgpt x1, flash=false")
    assert list(figures.left_out or ()) == ["jaxgpt x1, loss_chunks=7"]
    assert "left out: jaxgpt x1, loss_chunks=7, which stopped: XlaRuntimeError: RESOURCE_EXHAUSTED" in err
    assert len(first.losses) == 3 + 2 * 2
    assert again.losses == first.losses
    assert first.against_first is None
    assert again.against_first is not None
    least, most = again.step_ms.min / first.step_ms.max, again.step_ms.max / first.step_ms.min
    assert least <= again.against_first.min <= again.against_first.max <= most
    assert (first.startup_s or 0) > (first.compile_s or 0) > 0
    assert figures.settings["optimizer"] == "adamw"
    for row in figures.rows:
        assert row.profile is not None
        assert sum(kind.ms for kind in row.profile.kinds) == pytest.approx(row.profile.step_ms)
    for said in (
        "jaxgpt x1, where a step goes",
        "products, fp32",
        "optimizer",
        "_cross_entropy",
        "a plain copy",
    ):
        assert said in err


def test_time_is_compared_with_pytorch_s_a_token_round_by_round_and_without_the_warm_up() -> None:
    half = dataclasses.replace(TRAIN, batch_size=2)
    ours = Trainer("jaxgpt", 1, "cpu", MODEL, TRAIN, "")
    theirs = Trainer("pytorch", 1, "cpu", MODEL, TRAIN, "")
    smaller = Trainer("jaxgpt", 1, "cpu", MODEL, half, "", "batch_size=2")
    assert smaller.tokens_per_step == ours.tokens_per_step / 2

    def answers(warm_up_s: float, *rounds_s: float) -> list[dict[str, Any]]:
        times = (warm_up_s, *rounds_s)
        return [{"seconds": time, "cpu_seconds": 3 * time, "losses": [1.0]} for time in times]

    measured = {
        ours.name: answers(90.0, 1.0, 2.0, 4.0),
        theirs.name: answers(5.0, 2.0, 4.0, 8.0),
        smaller.name: answers(0.1, 1.0, 2.0, 4.0),
    }
    found = rounds.comparison(ours, theirs, measured)
    assert found.step_time_ratio == found.cpu_time_ratio == Spread(median=0.5, min=0.5, max=0.5)
    # Half the tokens in half the time is as fast.
    assert rounds.time_ratio(smaller, theirs, measured) == Spread(median=1.0, min=1.0, max=1.0)


def test_a_variant_changes_what_it_names() -> None:
    found = parse_variant("remat=true, batch-size=8,precision=bf16,n_layer=2,learning_rate=1e-3", FIRST)
    assert (found.train.remat, found.train.batch_size, found.train.precision) == (True, 8, "bf16")
    assert (found.model.n_layer, found.train.learning_rate, found.flash) == (2, 1e-3, None)
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_triton_gemm_any=true"
    found = parse_variant(f"flash=false,xla_flags={flags}", FIRST)
    assert (found.model, found.train, found.flash) == (MODEL, TRAIN, False)
    trainer = Trainer("jaxgpt", 1, "cpu", MODEL, TRAIN, "", found.name, found.flash, found.xla_flags)
    assert environment(trainer, 2, Path())["XLA_FLAGS"].endswith(flags)


def test_a_gpu_s_trainer_takes_the_share_of_memory_that_the_user_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under one name alone: with both JAX leaves the GPU and takes the CPU."""
    for name in SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    trainer = Trainer("jaxgpt", 1, "gpu", MODEL, TRAIN, "")
    assert environment(trainer, 2, Path())["XLA_CLIENT_MEM_FRACTION"] == "0.95"
    for name in SHARE_VARIABLES:
        monkeypatch.setenv(name, "0.8")
        assert not set(SHARE_VARIABLES) & set(environment(trainer, 2, Path()))
        monkeypatch.delenv(name)


BAD_VARIANTS = {
    "los_chunks=2": "no setting 'los_chunks'; did you mean loss_chunks",
    "loss_chunks": "needs one value",
    "remat=1": "remat (1) must be true or false",
    "loss_chunks=two": "loss_chunks ('two') must be a whole number",
    "loss_chunks=0": "must be at least 1",
    "precision=fp8": "must be fp32 or bf16 or fp16",
    "optimizer=muno": "did you mean muon",
    "batch_size=3,grad_accum_steps=2": "divisible by grad_accum_steps",
    "flash=maybe": "must be true or false",
    "xla_flags=autotune": "must begin with --xla_",
}


def test_a_bad_variant_is_one_clear_line() -> None:
    """In a process of its own, where no test watches the types of arguments before the command does."""
    code = (
        "from jaxgpt_bench.training.variants import *\n"
        "first = Variant('', ModelConfig(64, 16, 1, 1, 16), TrainConfig(batch_size=4))\n"
        f"for text in {list(BAD_VARIANTS)!r}:\n"
        "    try: print('no error', parse_variant(text, first))\n"
        "    except UserError as error: print(error)"
    )
    line, variables = python(code)
    done = subprocess.run(line, env=variables, capture_output=True, text=True, check=True)
    printed = done.stdout.splitlines()
    assert len(printed) == len(BAD_VARIANTS)
    for message, (text, said) in zip(printed, BAD_VARIANTS.items(), strict=True):
        assert said in message
        assert message.startswith(f"--variant {text!r}: ")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--variant", "remat=true", "--variant", "remat=true"), "given twice"),
        (("--variant", "flash=true"), "the device is a cpu, no GPU"),
        (
            ("--variant", "batch_size=3", "--devices", 2),
            "--variant batch_size=3: a micro-batch of 3 sequences",
        ),
        (("--pytorch", "fast"), "--pytorch fast"),
        (("--qat",), "--alone"),
    ],
)
def test_bad_comparisons_are_one_line(command: Command, more: tuple[object, ...], said: str) -> None:
    assert_one_line_error(command("jaxgpt-bench", "train", "tiny", *SHAPE, *more), said)


def test_help_shows_what_a_preset_is_measured_with(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command("jaxgpt-bench", "train", "gpt2", "--help")
    shown = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "--block-size INT longest context, tokens. (default: 1024)" in shown
    assert "--batch-size INT sequences an optimizer step, all devices together. (default: 12)" in shown
    assert "--grad-accum-steps INT micro-batches that a step's batch is cut into" in shown
    assert "(default: muon)" in shown
    assert "--warmup-steps" not in shown


class WorkerOnGpu:
    """A process that holds memory of a GPU of 80 GB as long as it lives."""

    alive: dict[str, float]
    needs: dict[str, float]
    started: list[str]

    def __init__(self, name: str, module: str, order: dict[str, Any], environment: dict[str, str]) -> None:
        assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        self.name = name
        self.started.append(name)
        if sum(self.alive.values()) + self.needs[name] > 80 * GB:
            raise RuntimeError(f"{name} stopped: OutOfMemoryError: CUDA out of memory")
        self.alive[name] = self.needs[name]

    def ask(self, question: dict[str, int]) -> dict[str, Any]:
        return {"losses": [0.0] * question["steps"]}

    def close(self) -> None:
        self.alive.pop(self.name, None)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[turns.Turns, list[Trainer]]]:
    """Return what warms up trainers that need so many GB each."""

    def make(*needs: float) -> tuple[turns.Turns, list[Trainer]]:
        trainers = [Trainer("jaxgpt", 1, "gpu", MODEL, TRAIN, "", str(i)) for i in range(len(needs))]
        names = [each.name for each in trainers]
        WorkerOnGpu.alive, WorkerOnGpu.started = {}, []
        WorkerOnGpu.needs = dict(zip(names, (GB * need for need in needs), strict=True))
        monkeypatch.setattr(turns, "Worker", WorkerOnGpu)
        monkeypatch.setattr(turns, "free_gpu_bytes", lambda: 80 * GB - sum(WorkerOnGpu.alive.values()))
        return turns.Turns(2, Path()), trainers

    return make


def test_trainers_that_fit_stay_alive(on_gpu: Callable[..., Any]) -> None:
    processes, trainers = on_gpu(20, 25, 20)
    assert all(processes.warm_up(each) for each in trainers)
    assert [processes.ask(each, {"steps": 1}) for each in trainers] == 3 * [[{"losses": [0.0]}]]
    assert (len(WorkerOnGpu.started), len(WorkerOnGpu.alive)) == (3, 3)
    processes.close()
    assert not WorkerOnGpu.alive


def test_the_trainer_that_was_asked_last_makes_room_for_the_next(on_gpu: Callable[..., Any]) -> None:
    """Of three of 30 GB two stay alive on 80, and half of the turns need no start; none is tried in vain."""
    processes, trainers = on_gpu(30, 30, 30)
    assert all(processes.warm_up(each) for each in trainers)
    assert list(WorkerOnGpu.alive) == ["jaxgpt x1, 0", "jaxgpt x1, 2"]
    for each in 2 * trainers:
        answers = processes.ask(each, {"steps": 2}, {"steps": 1})
        assert answers == [{"losses": [0.0, 0.0]}, {"losses": [0.0]}]
        assert len(WorkerOnGpu.alive) == 2
    assert len(WorkerOnGpu.started) == 3 + 3
    assert not processes.left_out


def test_a_trainer_that_finds_too_little_memory_gets_all_of_it(on_gpu: Callable[..., Any]) -> None:
    """One of 70 GB after one of 20: nothing told that it needs so much."""
    processes, trainers = on_gpu(20, 70, 20)
    assert all(processes.warm_up(each) for each in trainers)
    for each in trainers:
        assert processes.ask(each, {"steps": 1}) == [{"losses": [0.0]}]
    assert not processes.left_out


def test_a_trainer_that_fits_nowhere_is_left_out(on_gpu: Callable[..., Any]) -> None:
    processes, trainers = on_gpu(30, 90, 30)
    assert [processes.warm_up(each) is not None for each in trainers] == [True, False, True]
    assert processes.left_out == {"jaxgpt x1, 1": "stopped: OutOfMemoryError: CUDA out of memory"}
