import dataclasses
import json

import pytest
from conftest import Command, assert_one_line_error

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.mesh import make_mesh
from jaxgpt.plan import need, parse_memory, step_memory
from jaxgpt.shared.errors import UserError

MODEL = ModelConfig(vocab_size=2048, block_size=128, n_layer=2, n_head=4, n_embd=128)


@pytest.mark.parametrize("mesh", ["data=2", "fsdp=4", "data=2,fsdp=2"])
def test_the_plan_is_what_the_compiler_measures_for_another_batch(mesh: str) -> None:
    train = TrainConfig(batch_size=8, accumulate=2, loss_chunks=2)
    devices = 4 if "fsdp" in mesh else 2
    found = need(MODEL, train, make_mesh(mesh, devices))
    for sequences in (4, 8):
        measured = step_memory(MODEL, train, make_mesh(mesh, devices), sequences)
        assert abs(found.total(sequences) / measured - 1) < 0.1
    # AdamW keeps two numbers a parameter; fsdp splits all of it.
    whole = need(MODEL, train, make_mesh("", 1))
    assert whole.optimizer == pytest.approx(2 * whole.params, rel=0.01)
    share = 4 if mesh == "fsdp=4" else 2 if "fsdp" in mesh else 1
    assert found.params == pytest.approx(whole.params / share, rel=0.01)


def test_what_saves_memory_does() -> None:
    train = TrainConfig(batch_size=8)
    plain, remat = (
        need(dataclasses.replace(MODEL, n_layer=6), dataclasses.replace(train, remat=remat), make_mesh("", 1))
        for remat in (False, True)
    )
    assert remat.per_sequence < 0.7 * plain.per_sequence
    limit = plain.total(5) + 1
    assert plain.largest(limit) == 5
    assert plain.largest(plain.total(1) - 1) == 0


def test_command_names_the_largest_batch_or_what_takes_less(command: Command) -> None:
    arguments = ("plan", "tiny", "--mesh", "data=2", "--vocab-size", 512, "--block-size", 64)
    code, out, err = command("jaxgpt", *arguments, "--memory", "100MB", "--check", 3, "--json")
    figures = json.loads(out)
    assert code == 0
    assert figures["batch_size"] % figures["accumulate"] == 0
    assert figures["peak_bytes"] <= 100e6
    assert abs(figures["check_error"]) < 0.1
    assert "--accumulate" in err
    code, _, err = command("jaxgpt", *arguments, "--memory", "1MB")
    assert code == 1
    assert "--remat" in err


@pytest.mark.parametrize(("text", "expected"), [("16GB", 16e9), ("1.5 GiB", 1.5 * 2**30), ("200mb", 200e6)])
def test_sizes_of_memory(text: str, expected: float) -> None:
    assert parse_memory(text) == expected


def test_bad_input_is_one_line(command: Command) -> None:
    with pytest.raises(UserError, match="16GB"):
        parse_memory("sixteen")
    assert_one_line_error(command("jaxgpt", "plan", "tiny", "--mesh", "date=2"), "no axis")
    assert_one_line_error(command("jaxgpt", "plan", "tiny", "--memory", "-3"), "no size")
