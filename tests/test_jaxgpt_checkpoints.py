"""Which checkpoints stay over several starts, and what is done where one can't be read."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.shared.errors import UserError
from jaxgpt.training.run.checkpoints import Checkpoints
from jaxgpt.training.step.state import Guard, TrainState


def state_of(step: int) -> TrainState:
    array, guard = jnp.full((2, 2), float(step)), Guard(*[jnp.zeros(())] * 7)
    return TrainState(
        {"wte.embedding": array}, {"mu": array}, jnp.int32(step), jnp.zeros(2, jnp.uint32), guard
    )


def save(folder: Path, losses: dict[int, float | None], data_since: int = 0) -> list[int]:
    """Save steps in a start of their own; return what lies there then."""
    checkpoints = Checkpoints(folder, data_since=data_since)
    for step, val_loss in losses.items():
        checkpoints.save(state_of(step), {"step": step, "cpu_seconds": 0.0}, val_loss)
    checkpoints.close()
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_over_several_starts_the_two_latest_and_the_best_stay(tmp_path: Path) -> None:
    assert save(tmp_path, {1: 3.0, 2: 2.0, 3: 4.0}) == [2, 3]
    assert save(tmp_path, {4: 5.0, 5: None}) == [2, 4, 5]
    assert save(tmp_path, {6: 2.5}) == [2, 5, 6]
    assert save(tmp_path, {7: 1.0, 8: 6.0, 9: 6.0}) == [7, 8, 9]
    assert save(tmp_path, {10: 9.0, 11: 8.0, 12: 9.5}, data_since=9) == [11, 12]


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def fails_at(*steps: int) -> Callable[[Checkpoints, int, TrainState], tuple[TrainState, dict[str, Any]]]:
    """Return a Checkpoints.restore that can't read some steps, as one that finds no memory."""

    def restore(_: Checkpoints, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        if step in steps:
            raise UserError(f"checkpoint {step} can't be read (no memory)")
        return abstract, {"step": step}

    return restore


@pytest.mark.parametrize("position", [None, "{", "[]", '{"step": 1, "val_loss": "low"}', '{"step": 1}'])
def test_a_checkpoint_whose_loss_can_not_be_read_does_not_count_for_the_best_and_stays(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], position: str | None
) -> None:
    """Other than the loss it may be whole."""
    save(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    path = tmp_path / "checkpoints" / "1" / "position" / "metadata"
    path.unlink() if position is None else path.write_text(position)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.resolve("best") == 2
    assert (checkpoints.val_loss(1), checkpoints.val_loss(2)) == (None, 2.0)
    checkpoints.close()
    whole = position == '{"step": 1}'  # of a step that was not measured
    assert ("WARNING: the loss of checkpoint 1 does not count: " in capfd.readouterr().err) != whole
    assert save(tmp_path, {4: 4.0}) == ([2, 3, 4] if whole else [1, 2, 3, 4])


def test_what_can_not_be_read_is_moved_only_when_an_earlier_one_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that all have may lie in the machine or its settings, and go."""
    save(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(Checkpoints, "restore", fails_at(1, 2, 3))
        with pytest.raises(UserError, match=r"checkpoint 3 .* none was moved; mend"):
            checkpoints.restore_latest_whole(state_of(0))
    assert stored(tmp_path) == ["1", "2", "3"]
    assert not (tmp_path / "damaged").exists()
    monkeypatch.setattr(Checkpoints, "restore", fails_at(2, 3))
    assert checkpoints.restore_latest_whole(state_of(0))[1]["step"] == 1
    assert stored(tmp_path) == ["1"]
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "damaged").iterdir()) == ["2", "3"]
    checkpoints.close()


def test_parameters_that_are_not_those_that_were_saved_are_refused(tmp_path: Path) -> None:
    """convert, evaluate and --init read them alone, without the optimizer's state."""
    save(tmp_path, {1: 1.0})
    position = tmp_path / "checkpoints" / "1" / "position" / "metadata"
    found = json.loads(position.read_text())
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state_of(1).params)

    def read(said: dict[str, object]) -> dict[str, jax.Array]:
        position.write_text(json.dumps(said))
        checkpoints = Checkpoints(tmp_path, read_only=True)
        try:
            return checkpoints.restore_params(1, abstract)
        finally:
            checkpoints.close()

    of_before = {name: value for name, value in found.items() if name != "params_checksum"}
    for said in (found, of_before):
        assert float(read(said)["wte.embedding"][0, 0]) == 1.0
    with pytest.raises(UserError, match="its parameters do not have the checksum"):
        read({**found, "params_checksum": found["params_checksum"] ^ 1})


class LeftError(Exception):
    """The process would have ended."""


def test_one_of_several_processes_that_can_not_read_a_checkpoint_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait in the barrier at the end of Orbax's restore, not where processes agree."""
    save(tmp_path, {1: 1.0})
    checkpoints = Checkpoints(tmp_path)

    def restore(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def leave(text: str, code: int) -> None:
        raise LeftError(text, code)

    with monkeypatch.context() as several:
        several.setattr(checkpoints._manager, "restore", restore)
        several.setattr("jaxgpt.training.run.checkpoints.leave", leave)
        several.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(LeftError) as left:
            checkpoints.restore_params(1, {})
    checkpoints.close()
    text, code = left.value.args
    assert (code, "\n" in text) == (2, False)
    assert text.startswith(f"error: checkpoint {tmp_path / 'checkpoints' / '1'} can't be read (OSError: ")


def test_all_processes_read_the_step_that_process_0_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host may see a checkpoint of the shared file system later than another."""
    save(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    checkpoints = Checkpoints(tmp_path, read_only=True)
    monkeypatch.setattr("jaxgpt.training.run.checkpoints.of_main_process", lambda _: 2)
    monkeypatch.setattr(Checkpoints, "restore", fails_at())
    assert checkpoints.restore_latest_whole(state_of(0))[1]["step"] == 2
    assert checkpoints.latest() == checkpoints.best() == 2
    checkpoints.close()
