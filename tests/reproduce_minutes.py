"""A reproduction that is planned in minutes, without the seconds that its trials take."""

import dataclasses
from pathlib import Path
from typing import Any

import jaxgpt_bench.reproduce.build as build_module
import jaxgpt_bench.reproduce.measure as measure_module
import pytest
from jaxgpt_bench.reproduce.minutes import plan, probe
from jaxgpt_bench.reproduce.minutes.probe import Attempt, CpuSpeed
from jaxgpt_bench.reproduce.recipes import RECIPES
from test_bench_reproduce import RECIPE, speed_figures

from jaxgpt.shared.console import Result

CPU = CpuSpeed(forward_s=0.2, decode_s=0.01, cores=16)
ATTEMPT = Attempt(
    settings={}, why="as the preset has it", step_s=0.05, startup_s=20.0, block_size=64, tokens_per_step=256,
    state_bytes=10**7, peak_bytes=1e7, device="cpu", platform="cpu", devices=1, precision="fp32",
    attention="",
)  # fmt: skip


class FakeProbe(probe.Probe):
    """The process that tries a training, without the seconds that it takes."""

    def __init__(self, folder: Path) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def attempt(self, settings: dict[str, Any], fits_device: bool) -> Attempt:
        chosen = {"batch_size": 128, "grad_accum_steps": 4, "remat": False} if fits_device else {}
        tokens = 128 * 64 if fits_device else 256
        return dataclasses.replace(ATTEMPT, settings=chosen, tokens_per_step=tokens)

    def cpu_speed(self, settings: dict[str, Any]) -> CpuSpeed:
        return dataclasses.replace(CPU, forward_s=0.01, decode_s=0.001)


def quick_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' recipe as preset "tests", one method, no trial, no minutes of speed."""
    monkeypatch.setitem(RECIPES, "tests", RECIPE)
    monkeypatch.setattr(build_module, "QUANTIZED", build_module.QUANTIZED[:1])
    monkeypatch.setattr(measure_module, "generate", lambda asked: Result(speed_figures()))
    monkeypatch.setattr(plan, "Probe", FakeProbe)


def asked(minutes: float, **other: Any) -> plan.Asked:
    given = {"preset": "tests", "budget_s": None, "methods": 5, "other_tokens": 0, **other}
    return plan.Asked(minutes=minutes, **given)
