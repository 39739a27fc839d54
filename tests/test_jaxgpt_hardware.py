import math
import types

import pytest

from jaxgpt.shared.architecture import flops_per_token
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.presets import find_preset
from jaxgpt.training.devices.memory import free_device_bytes
from jaxgpt.training.devices.precision import compute_capability, peak_flops


@pytest.mark.parametrize(
    ("kind", "precision", "tflops"),
    [
        ("Tesla T4", "fp16", 65.0),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-PCIE-16GB", "fp16", 112.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40S", "bf16", None),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 156.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "bf16", 989.4),
        ("cpu", "fp32", None),
    ],
)
def test_peak_rates_are_the_datasheets_dense_ones(kind: str, precision: str, tflops: float | None) -> None:
    found = peak_flops(kind, precision)  # type: ignore[arg-type]
    assert found == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_flops_of_gpt2_124m_follow_the_published_formula() -> None:
    model = find_preset("gpt2").model(50_257)
    parameters = 124_439_808 - 1024 * 768  # GPT-2's published count, without wpe
    assert flops_per_token(model) == 6 * parameters + 12 * 12 * 768 * 1024


def test_free_memory_of_a_cpu_device_is_its_share_of_what_the_system_has_left() -> None:
    free = free_device_bytes()
    assert free is not None
    with open("/proc/meminfo", encoding="ascii") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < free <= total / 8  # the tests simulate 8 devices


def test_a_control_group_s_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxgpt.training.devices.memory.control_group_free_bytes", lambda: 8e6)
    assert free_device_bytes() == 1e6


def test_rotary_positions_need_no_flops_of_wpe() -> None:
    learned = ModelConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=16)
    rotary = ModelConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=16, positions="rotary")
    assert math.isclose(flops_per_token(learned), flops_per_token(rotary))


@pytest.mark.parametrize(("capability", "expected"), [("7.5", 7.5), ("gfx90a", 0.0), (None, 0.0)])
def test_a_capability_that_is_no_number_is_none(
    monkeypatch: pytest.MonkeyPatch, capability: str | None, expected: float
) -> None:
    """CUDA's are numbers, ROCm's are names; a CPU has none."""
    device = (
        types.SimpleNamespace()
        if capability is None
        else types.SimpleNamespace(compute_capability=capability)
    )
    monkeypatch.setattr("jax.local_devices", lambda: [device])
    assert compute_capability() == expected
