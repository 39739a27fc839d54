import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Command, assert_one_line_error, rows, write_jsonl

from jaxgpt.shared.dataset import count_windows, open_dataset
from jaxgpt.training.devices.mesh import make_mesh
from jaxgpt.training.model.params import graph_of, init_params, merge
from jaxgpt.training.run.checkpoints import load_params
from jaxgpt.training.run.folder import open_run
from jaxgpt.training.step.train_step import make_eval_step
from jaxgpt.training.validation import validation_loss


def test_validation_loss_is_the_float64_mean_over_the_whole_split(
    command: Command, run: Path, data: Path
) -> None:
    code, out, _ = command("jaxgpt", "evaluate", "--run", run, "--json", "--batch-size", 3)
    assert code == 0
    figures = json.loads(out)
    dataset = open_dataset(data)
    step, losses = losses_of_tokens(run, np.asarray(dataset.val, np.int64))
    assert figures["step"] == step == 40
    assert figures["val_tokens"] == len(dataset.val) - 1
    # float32 sums over windows of 64 tokens: relative 1e-6.
    assert abs(figures["val_loss"] - losses.mean()) < 1e-5
    documents = dataset.manifest["counts"]["val_bytes"]
    assert abs(figures["val_bits_per_byte"] - losses.sum() / math.log(2) / documents) < 1e-5


def losses_of_tokens(run: Path, tokens: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the best step, and its loss on each token but the first, window by window in its own length."""
    opened = open_run(run)
    config = opened.config.model
    step, params = load_params(opened, "best")
    model, losses = merge(graph_of(config), params), []
    for start in range(0, len(tokens) - 1, config.block_size):
        window = tokens[start : start + config.block_size + 1]
        z = np.asarray(model(jnp.asarray(window[None, :-1])), np.float64)[0]
        log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        losses.append(-log_p[np.arange(len(window) - 1), window[1:]])
    return step, np.concatenate(losses)


def test_of_pairs_the_loss_on_the_answers_is_evaluated(
    command: Command, run: Path, data: Path, work: Path, tmp_path: Path
) -> None:
    source = ("--source", work / "rows.jsonl", "--template", "{instruction} {input} {output}")
    options = ("--tokenizer", data, "--answers-only", "--val-fraction", 0.02, "--out", tmp_path / "d")
    assert command("jaxgpt", "prepare", *source, *options)[0] == 0
    code, out, _ = command("jaxgpt", "evaluate", "--run", run, "--data", tmp_path / "d", "--json")
    assert code == 0
    figures, dataset = json.loads(out), open_dataset(tmp_path / "d")
    assert dataset.val_mask is not None
    bits = np.unpackbits(dataset.val_mask, count=len(dataset.val), bitorder="little").astype(bool)
    losses = losses_of_tokens(run, np.asarray(dataset.val, np.int64))[1][bits[1:]]
    assert figures["val_tokens"] == len(losses) < len(dataset.val) - 1
    assert abs(figures["val_loss"] - losses.mean()) < 1e-5
    answers = dataset.manifest["counts"]["val_answer_bytes"]
    assert abs(figures["val_bits_per_byte"] - losses.sum() / math.log(2) / answers) < 1e-5


def test_loss_recorded_in_training_is_the_one_evaluated_afterwards(command: Command, run: Path) -> None:
    figures = json.loads(command("jaxgpt", "evaluate", "--run", run, "--json", "--cpu-devices", 8)[1])
    summary = json.loads((run / "summary.json").read_text())
    assert abs(figures["val_loss"] - summary["val_loss"]) < 1e-6


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_part_of_the_split_is_windows_spread_evenly_over_it_whatever_the_batch(
    run: Path, data: Path, batch: int
) -> None:
    """Against each window measured by itself."""
    dataset, model, mesh = open_dataset(data), open_run(run).config.model, make_mesh("", 1)
    params, step = init_params(model, 0), jax.jit(make_eval_step(graph_of(model)))
    windows = count_windows(dataset.val, 16)
    assert windows > 3 * 7
    parts = [dataset.val_windows(16, place * windows // 7, place * windows // 7 + 1) for place in range(7)]
    losses, counts = zip(*(step(params, *part) for part in parts), strict=True)
    found = validation_loss(step, params, dataset, 16, batch, mesh, tokens=16 * 7 + 15)
    assert found["val_loss"] == pytest.approx(sum(map(float, losses)) / sum(map(int, counts)), rel=1e-6)
    size = dataset.val_bytes * sum(map(int, counts)) / dataset.val_targets
    bits = sum(map(float, losses)) / math.log(2) / size
    assert found["val_bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    whole = [
        validation_loss(step, params, dataset, 16, batch, mesh, tokens=tokens)
        for tokens in (0, len(dataset.val) + 15, 2**31 - 1)
    ]
    assert whole[0] == whole[1] == whole[2] != found


def test_evaluating_leaves_the_settings_of_jax_as_they_were(command: Command, run: Path) -> None:
    before = dict(jax.config.values)
    assert command("jaxgpt", "evaluate", "--run", run)[0] == 0
    assert dict(jax.config.values) == before
    assert jax.config.jax_default_matmul_precision is None


def test_products_are_evaluated_in_full_float32(
    command: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU they always are; the precision that is asked for shows where the device has others."""
    seen = []

    def validation_loss(*arguments: object) -> dict[str, float]:
        seen.append(jax.config.jax_default_matmul_precision)
        return {"val_loss": 1.0, "val_bits_per_byte": 1.0}

    monkeypatch.setattr("jaxgpt.training.validation.validation_loss", validation_loss)
    assert command("jaxgpt", "evaluate", "--run", run)[0] == 0
    assert seen == ["highest"]


def test_data_of_another_tokenizer_is_one_line(command: Command, run: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", rows(100, seed=9))
    arguments = ("--source", source, "--tokenizer", "bpe:300", "--val-fraction", 0.3, "--out", tmp_path / "d")
    assert command("jaxgpt", "prepare", *arguments)[0] == 0
    result = command("jaxgpt", "evaluate", "--run", run, "--data", tmp_path / "d")
    assert_one_line_error(result, "does not fit the checkpoint", "bpe:300", "bpe:384")


def test_step_that_is_not_stored_names_those_that_are(command: Command, run: Path) -> None:
    assert_one_line_error(command("jaxgpt", "evaluate", "--run", run, "--step", "7"), "'7'", "40")


def test_folder_that_is_no_run_is_one_line(command: Command, tmp_path: Path, data: Path) -> None:
    assert_one_line_error(
        command("jaxgpt", "evaluate", "--run", tmp_path / "none"), "is missing", "jaxgpt train"
    )
    assert_one_line_error(command("jaxgpt", "evaluate", "--run", data), "config.json", "missing")


def test_tokenizer_that_was_swapped_in_the_run_is_one_line(
    command: Command, run: Path, tmp_path: Path
) -> None:
    from jaxgpt.data.make_tokenizer import make_tokenizer

    shutil.copytree(run, tmp_path / "run")
    make_tokenizer("bpe:384", ["entirely different text " * 50]).save(tmp_path / "run" / "tokenizer")
    result = command("jaxgpt", "sample", "--run", tmp_path / "run")
    assert_one_line_error(result, "tokenizer", "does not fit the checkpoint")
