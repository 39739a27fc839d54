"""`jaxgpt train --init`: from runs and from Hugging Face folders, checked against transformers."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_SHAPE, TINY_TRAIN, Command, assert_one_line_error, run_command
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.dataset import open_dataset, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import load_tokenizer
from jaxgpt.training.batches import Batches
from jaxgpt.training.devices.mesh import make_mesh
from jaxgpt.training.model.params import abstract_params, init_params
from jaxgpt.training.model.qat_scales import with_scales
from jaxgpt.training.run import init_from
from jaxgpt.training.run.checkpoints import load_params
from jaxgpt.training.run.folder import (
    RunConfig,
    create_run,
    differences,
    in_words,
    open_run,
    read_metrics,
    read_run_config,
    require_same_training,
)
from jaxgpt.training.run.init_from import open_init_source
from jaxgpt.training.run.recorder import make_recorder
from jaxgpt.training.run.training import Training

FLOAT32_LOSS_TOLERANCE = 1e-4
SHORT = ("--max-steps", 4, "--eval-every", 4, "--checkpoint-every", 2, "--sample-every", 0)


def train_arguments(data: Path, out: Path, init: Path, *more: object) -> tuple[object, ...]:
    where = ("tiny", "--data", data, "--out", out, "--init", init, "--cpu-devices", 2)
    return ("jaxgpt", "train", *where, *TINY_TRAIN, *SHORT, *more)


def rows_with(run: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_metrics(run) if name in row}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def transformers_folder(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder that transformers wrote, every parameter random, with the data set's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "model"
    tokenizer = load_tokenizer(data)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=1, n_head=2,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (1.0 if ".ln_" in f".{name}" else 0.0))
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def artifact(tmp_path: Path, data: Path) -> Path:
    """A small float32 artifact, to be spoiled."""
    model = ModelConfig(load_tokenizer(data).vocab_size, 64, 1, 2, 16)
    folder = tmp_path / "artifact"
    folder.mkdir()
    names = {parameter.flax_name: parameter.hf_name for parameter in parameters(model)}
    tensors = {names[name]: np.array(array) for name, array in init_params(model, 0).items()}
    save_file(tensors, folder / "model.safetensors")
    value = {"model_type": "gpt2", "vocab_size": model.vocab_size, "n_positions": 64}
    value |= {"n_layer": 1, "n_head": 2, "n_embd": 16, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(value))
    load_tokenizer(data).save(folder)
    return folder


def test_names_are_those_of_transformers() -> None:
    for tied in (True, False):
        config = GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2)
        theirs = set(GPT2LMHeadModel(config).state_dict())
        model = ModelConfig(50, 8, 2, 2, 16, tied=tied)
        ours = {parameter.hf_name for parameter in parameters(model)}
        assert ours == theirs - ({"lm_head.weight"} if tied else set())
        flax = {parameter.flax_name: parameter.hf_shape for parameter in parameters(model)}
        assert flax == {name: leaf.shape for name, leaf in abstract_params(model).items()}


def test_the_loss_goes_on_where_transformers_stands(
    command: Command, transformers_folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert command(*train_arguments(data, out, transformers_folder, "--optimizer", "adamw"))[0] == 0
    model = GPT2LMHeadModel.from_pretrained(transformers_folder).eval()
    dataset = open_dataset(data)

    def loss(inputs: np.ndarray, targets: np.ndarray) -> float:
        with torch.inference_mode():
            logits = model(torch.from_numpy(inputs).long()).logits
        flat = torch.from_numpy(targets).long().flatten()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-1))

    batch = Batches(dataset.train, 64, 8, 0).at(0)
    assert rows_with(out, "loss")[1] == pytest.approx(loss(*batch), abs=FLOAT32_LOSS_TOLERANCE)
    val = rows_with(out, "val_loss")
    assert list(val) == [0, 4]
    assert val[0] == pytest.approx(loss(*windows(dataset.val, 64)), abs=FLOAT32_LOSS_TOLERANCE)
    init = json.loads((out / "config.json").read_text())["init"]
    assert (init["kind"], init["step"]) == ("artifact", None)
    if not model.config.tie_word_embeddings:  # samples come from the head of its own, too
        assert command("jaxgpt", "sample", "--run", out, "--max-new-tokens", 3)[0] == 0


@pytest.fixture(scope="module")
def qat_run(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went on from another with rounding, over fsdp, its table padded."""
    out = tmp_path_factory.mktemp("qat") / "run"
    arguments = ("--qat", "--mesh", "fsdp=2", "--grad-accum-steps", 2, "--vocab-multiple", 128)
    assert run_command(*train_arguments(data, out, run, *arguments)) == 0
    return out


def resume_arguments(data: Path, out: Path, init: Path, *more: object) -> tuple[object, ...]:
    shape = ("--qat", "--mesh", "fsdp=2", "--grad-accum-steps", 2, "--vocab-multiple", 128)
    return train_arguments(data, out, init, *shape, *more)


def test_rounding_costs_little_at_first_and_steps_are_trained(run: Path, qat_run: Path) -> None:
    best = min(rows_with(run, "val_loss").values())
    val = rows_with(qat_run, "val_loss")
    assert 0 < abs(val[0] - best) < 0.01
    assert val[4] < val[0]
    opened = open_run(qat_run)
    before, after = (load_params(opened, step)[1] for step in ("2", "4"))
    names = [name for name in after if name.endswith("input_scale")]
    assert len(names) == 9
    for name in names:
        assert after[name] > 0
        assert after[name] != before[name]
    config = read_run_config(qat_run)
    assert config.model == dataclasses.replace(read_run_config(run).model, qat=True)
    assert config.init is not None
    assert (config.init["kind"], config.init["step"]) == ("run", 40)


def interrupted(run: Path, folder: Path) -> Path:
    """A copy of a run as it stood after step 2."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "summary.json").unlink()
    return folder


def test_a_run_that_began_with_another_resumes_bit_for_bit(
    command: Command, run: Path, qat_run: Path, data: Path, tmp_path: Path
) -> None:
    out = interrupted(qat_run, tmp_path / "run")
    moved = shutil.copytree(run, tmp_path / "moved")  # the same run elsewhere
    code, _, err = command(*resume_arguments(data, out, moved))
    assert code == 0
    assert "resuming after step 2" in err
    assert rows_with(out, "loss") == rows_with(qat_run, "loss")
    assert rows_with(out, "val_loss") == rows_with(qat_run, "val_loss")


def test_resuming_with_another_start_is_refused(
    command: Command, run: Path, qat_run: Path, data: Path, tmp_path: Path
) -> None:
    out = interrupted(qat_run, tmp_path / "run")
    result = command(*resume_arguments(data, out, qat_run))
    assert_one_line_error(result, "init was run", "now run", "another --out")
    plain = ("jaxgpt", "train", "tiny", "--data", data, "--out", out, "--cpu-devices", 2, "--qat")
    result = command(*plain, *TINY_SHAPE, *TINY_TRAIN, *SHORT)
    assert_one_line_error(result, "init was run", "now none", "another --out")


def test_a_run_with_checkpoints_resumes_without_the_folder_that_it_began_with(
    artifact: Path, data: Path, tmp_path: Path
) -> None:
    """It may have changed since, or be gone. Before the first checkpoint it is needed, another one always."""
    out, dataset = tmp_path / "run", open_dataset(data)
    train, mesh = TrainConfig(batch_size=2), make_mesh("", 1)
    began = Training(open_init_source(artifact).model, train, dataset, mesh, init=open_init_source(artifact))
    create_run(out, began.config)
    (out / "tokenizer").mkdir()
    began.tokenizer.save(out / "tokenizer")
    other = shutil.copytree(artifact, tmp_path / "other")
    shutil.rmtree(artifact)
    with pytest.raises(UserError, match="is no folder"):
        open_init_source(artifact, out)
    (out / "checkpoints" / "2").mkdir(parents=True)
    source = open_init_source(artifact, out)
    training = Training(source.model, train, dataset, mesh, init=source)
    assert training.config == began.config
    require_same_training(out, training.config)
    with pytest.raises(UserError, match="is no folder"):  # no new parameters instead
        training.first_state()
    assert open_init_source(other, out).known is None


def test_a_start_that_was_trained_again_with_the_same_settings_is_another(
    run: Path, qat_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another CPU gives other parameters, and the same config.json."""
    config = read_run_config(qat_run)

    def begun_with() -> RunConfig:
        return dataclasses.replace(config, init=open_init_source(run).read(config.model)[1])

    assert differences(config, begun_with()) == {}
    step, params = load_params(open_run(run), "best")
    again = {**params, "ln_f.bias": np.nextafter(params["ln_f.bias"], 1, dtype=np.float32)}
    monkeypatch.setattr(init_from, "load_params", lambda *_: (step, again))
    assert list(differences(config, begun_with())) == ["init"]
    assert "with parameters" in in_words(differences(config, begun_with()))
    assert config.init is not None
    old = {name: value for name, value in config.init.items() if name != "params_sha256"}
    assert differences(dataclasses.replace(config, init=old), begun_with()) == {}  # of before: it can't tell


def test_a_run_killed_before_its_first_checkpoint_keeps_no_row(qat_run: Path, tmp_path: Path) -> None:
    """It begins again with the validation at step 0."""
    for first, steps in ((2, {0, 1, 2}), (0, set())):
        shutil.copy(qat_run / "metrics.jsonl", tmp_path)
        make_recorder(tmp_path, first, 4, 512, None).close()
        assert {row["step"] for row in read_metrics(tmp_path)} == steps


def test_steps_are_kept_with_qat_and_left_out_without(qat_run: Path, data: Path) -> None:
    initial = open_init_source(qat_run)
    step, stored = load_params(open_run(qat_run), "best")
    kept, entry = initial.read(initial.model)
    assert (entry["kind"], entry["step"]) == ("run", step)
    assert kept.keys() == stored.keys()
    assert all(np.array_equal(kept[name], stored[name]) for name in kept)
    plain, _ = initial.read(dataclasses.replace(initial.model, qat=False))
    assert plain.keys() == {name for name in kept if not name.endswith("input_scale")}


def test_rounding_from_scratch_begins_with_calibrated_steps(data: Path) -> None:
    dataset = open_dataset(data)
    model = ModelConfig(dataset.vocab_size, 64, 1, 2, 32, qat=True)
    params = with_scales(model, None, dataset.train, 3)
    drawn = init_params(dataclasses.replace(model, qat=False), 3)
    assert params.keys() == abstract_params(model).keys()
    assert all(np.array_equal(params[name], drawn[name]) for name in drawn)
    # LayerNorm's output of 32 channels reaches 3 to 5: a step of about 4 / 127
    assert 0.01 < float(params["h.0.attn.c_attn.input_scale"]) < 0.05


def test_a_shorter_context_cuts_the_positions(artifact: Path) -> None:
    initial = open_init_source(artifact)
    params, _ = initial.read(dataclasses.replace(initial.model, block_size=10))
    tensors = load_file(artifact / "model.safetensors")
    assert np.array_equal(params["wpe.embedding"], tensors["transformer.wpe.weight"][:10])
    assert np.array_equal(params["wte.embedding"], tensors["transformer.wte.weight"])


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_rotary_artifacts_have_no_positions_to_read(artifact: Path) -> None:
    change_config(artifact, model_type="jaxgpt_gpt2", positions="rotary")
    change_tensors(artifact, lambda tensors: tensors.pop("transformer.wpe.weight"))
    initial = open_init_source(artifact)
    assert initial.model.positions == "rotary"
    assert "wpe.embedding" not in initial.read(initial.model)[0]


LN, WTE = "transformer.ln_f.weight", "transformer.wte.weight"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "quantized": (
        lambda f: change_config(f, model_type="jaxgpt_gpt2", quantization={"method": "dynamic"}),
        ("quantized artifact", "float32 artifact"),
    ),
    "other model": (lambda f: change_config(f, model_type="llama"), ("'llama'", "expected gpt2")),
    "relu": (lambda f: change_config(f, activation_function="relu"), ("activation_function 'relu'",)),
    "no shape": (lambda f: change_config(f, n_head=None), ("config.json lacks n_head",)),
    "impossible": (lambda f: change_config(f, n_head=3), ("n_embd (16)", "n_head (3)")),
    "shape": (lambda f: change_config(f, n_positions=32), ("wpe.weight", "(64, 16)", "expected", "(32, 16)")),
    "missing": (lambda f: change_tensors(f, lambda t: t.pop(LN)), ("missing tensors", LN)),
    "extra": (
        lambda f: change_tensors(f, lambda t: t.update({"lm_head.weight": t[WTE].copy()})),
        ("unexpected tensors", "lm_head.weight"),
    ),
    "untied": (lambda f: change_config(f, tie_word_embeddings=False), ("missing tensors", "lm_head.weight")),
    "half": (
        lambda f: change_tensors(f, lambda t: t.update({LN: t[LN].astype(np.float16)})),
        (LN, "float16", "float32"),
    ),
    "NaN": (lambda f: change_tensors(f, lambda t: t[WTE].__setitem__((3, 4), np.nan)), (WTE, "NaN")),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        ("model.safetensors", "can't be read"),
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("model.safetensors is missing",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json is missing",)),
    "no tokenizer": (lambda f: (f / "merges.txt").unlink(), ("tokenizer", "can't be read")),
    "vocabulary": (lambda f: change_config(f, vocab_size=400), ("384 tokens", "400")),
    "no folder": (shutil.rmtree, ("is no folder", "expected a run")),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_a_folder_that_can_not_be_begun_with_is_one_line_and_leaves_no_run(
    command: Command, artifact: Path, data: Path, tmp_path: Path, what: str
) -> None:
    spoil, parts = BAD_FOLDERS[what]
    spoil(artifact)
    assert_one_line_error(command(*train_arguments(data, tmp_path / "r", artifact)), *parts)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--n-layer", 2), ("--n-layer 2", "has 1", "leave --n-layer out")),
        (("--n-head", 1), ("--n-head 1", "has 2")),
        (("--n-embd", 32), ("--n-embd 32", "has 16")),
        (("--positions", "rotary"), ("--positions rotary", "has learned")),
        (("--no-tied",), ("--no-tied:", "has --tied", "leave --no-tied out")),
        (("--block-size", 65), ("--block-size 65", "64 positions", "at most 64")),
    ],
)
def test_options_that_contradict_the_folder_are_refused(
    command: Command, artifact: Path, data: Path, tmp_path: Path, more: tuple[object, ...], parts: tuple[str]
) -> None:
    assert_one_line_error(command(*train_arguments(data, tmp_path / "r", artifact, *more)), *parts)
    assert not (tmp_path / "r").exists()


def test_data_of_another_tokenizer_are_refused(
    command: Command, artifact: Path, run: Path, work: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    arguments = ("--source", work / "rows.jsonl", "--tokenizer", "bpe:300", "--val-fraction", 0.1)
    assert command("jaxgpt", "prepare", *arguments, "--out", other)[0] == 0
    for init in (artifact, run):
        result = command(*train_arguments(other, tmp_path / "r", init))
        assert_one_line_error(result, "384 tokens", "300 tokens", f"prepare --tokenizer {init}")
    assert not (tmp_path / "r").exists()


def test_runs_of_before_init_was_written_down_can_be_read(run: Path, tmp_path: Path) -> None:
    value = json.loads((run / "config.json").read_text())
    assert value.pop("init") is None
    for name in ("tied", "qat"):
        del value["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(value))
    assert read_run_config(tmp_path) == read_run_config(run)
