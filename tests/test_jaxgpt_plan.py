import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from conftest import Command, assert_one_line_error

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.machine import SHARE_VARIABLES, allocator_share
from jaxgpt.shared.presets import find_preset
from jaxgpt.training.devices.mesh import make_mesh
from jaxgpt.training.model.numerics import Numerics
from jaxgpt.training.plan import parse_memory
from jaxgpt.training.step.compiled import CompiledTraining, peak_bytes

TINY = ("plan", "tiny", "--vocab-size", 512, "--block-size", 32)


def test_peak_counts_arguments_results_and_what_lives_between() -> None:
    """2 MB in, 1 MB out, and a product of 4 MB that has to exist."""
    half = jax.ShapeDtypeStruct((1, 250_000), jnp.float32)
    pair = jax.ShapeDtypeStruct((2, 250_000), jnp.float32)
    compiled = jax.jit(lambda a, b: jnp.sort(a, axis=1)[:1] + b).lower(pair, half).compile()
    assert 2e6 + 1e6 + 1e6 <= peak_bytes(compiled) <= 1e7


@pytest.mark.slow
def test_the_largest_micro_batch_that_fits_is_found_by_compiling(command: Command) -> None:
    code, out, _ = command("jaxgpt", *TINY, "--mesh", "data=2", "--memory", "20MB", "--json")
    figures = json.loads(out)
    assert code == 0
    peaks = {int(n): value for n, value in figures["peak_bytes"].items()}
    largest = figures["largest_sequences_per_device"]
    assert figures["usable_bytes"] == 0.75 * 20e6
    assert peaks[largest] <= 15e6
    assert all(value > 15e6 for n, value in peaks.items() if n > largest)
    assert figures["accumulate"] * largest * 2 == figures["batch_size"]
    state = figures["params_bytes"] + figures["optimizer_bytes"]
    assert min(peaks.values()) > state + figures["gradients_bytes"]


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("data=2", marks=pytest.mark.slow),
        pytest.param("fsdp=2", marks=pytest.mark.slow),
        "data=2,fsdp=2",
    ],
)
@pytest.mark.parametrize(
    ("preset", "sequences"),
    [
        ("tiny", 8),
        pytest.param("small", 1, marks=pytest.mark.slow),
        pytest.param("gpt2", 1, marks=pytest.mark.slow),
    ],
)
def test_plan_reports_the_bytes_of_the_step_that_training_compiles(
    preset: str, sequences: int, mesh: str, command: Command
) -> None:
    """The training's own step, with all its micro-batches, against the plan's, which compiles two at most."""
    devices = 2 if mesh.count("=") == 1 else 4
    shape = ("--batch-size", sequences * devices, "--block-size", 32, "--vocab-size", 256)
    code, out, _ = command("jaxgpt", "plan", preset, "--mesh", mesh, *shape, "--memory", "80GB", "--json")
    assert code == 0
    planned = {int(n): value for n, value in json.loads(out)["peak_bytes"].items()}
    found = find_preset(preset)
    model = dataclasses.replace(found.model(256), block_size=32)
    each = min(planned)  # of sequences in a micro-batch
    train = dataclasses.replace(
        found.train, batch_size=sequences * devices, grad_accum_steps=sequences // each
    )
    step = CompiledTraining(model, train, make_mesh(mesh, devices), Numerics()).compile_step()
    assert planned[each] == pytest.approx(peak_bytes(step), rel=0.1)


def test_fsdp_splits_what_data_copies(command: Command) -> None:
    def figures(mesh: str) -> dict[str, float]:
        found: dict[str, float] = json.loads(
            command("jaxgpt", *TINY, "--mesh", mesh, "--batch-size", 4, "--json")[1]
        )
        return found

    data, fsdp = figures("data=4"), figures("fsdp=4")
    for name in ("params_bytes", "optimizer_bytes"):
        assert fsdp[name] == pytest.approx(data[name] / 4, rel=0.01)


def test_what_does_not_fit_says_what_takes_less(command: Command) -> None:
    code, _, err = command("jaxgpt", *TINY, "--memory", "1MB", "--batch-size", 2)
    assert code == 1
    assert "not even one sequence fits into 0.75 MB" in err
    assert "fsdp" in err
    assert "flash" not in err
    _, _, err = command("jaxgpt", *TINY, "--memory", "1MB", "--batch-size", 2, "--precision", "bf16")
    assert "counted without flash attention" in err


def test_the_share_that_jax_takes_is_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    for name in SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert allocator_share() == 0.75
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    assert allocator_share() == 0.5
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")
    with pytest.raises(UserError, match="both set"):
        allocator_share()
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    assert allocator_share() == 0.95
    for wrong in ("most", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", wrong)
        assert_one_line_error(command("jaxgpt", *TINY), "XLA_CLIENT_MEM_FRACTION", wrong, "such as 0.9")


@pytest.mark.parametrize(("text", "expected"), [("16GB", 16e9), ("1.5 GiB", 1.5 * 2**30), ("200mb", 200e6)])
def test_sizes_of_memory(text: str, expected: float) -> None:
    assert parse_memory(text) == expected


def test_bad_input_is_one_line(command: Command) -> None:
    with pytest.raises(UserError, match="16GB"):
        parse_memory("sixteen")
    assert_one_line_error(command("jaxgpt", "plan", "tiny", "--mesh", "date=2"), "no axis")
    assert_one_line_error(command("jaxgpt", "plan", "tiny", "--memory", "-3"), "no size")
    assert_one_line_error(command("jaxgpt", "plan", "tiny", "--memory", "0GB"), "no size")
    assert_one_line_error(command("jaxgpt", *TINY, "--batch-size", 0), "batch_size (0)")
    assert_one_line_error(command("jaxgpt", *TINY, "--mesh", "data=5000"), "5000 devices")
    assert_one_line_error(command("jaxgpt", *TINY, "--mesh", "data=3"), "batch 8", "3 devices")
