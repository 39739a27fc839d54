import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jaxgpt_bench.reproduce.build as build_module
import jaxgpt_bench.reproduce.measure as measure_module
import numpy as np
import pytest
from conftest import TINY_SHAPE, TINY_TRAIN, Command, assert_one_line_error, rows, write_jsonl
from jaxgpt_bench.quality.samples import FIXED_PROMPTS
from jaxgpt_bench.reproduce import recipes, stages
from jaxgpt_bench.reproduce.memorization import Corpus, longest_runs, overlap
from jaxgpt_bench.reproduce.page.render import is_earlier_data
from jaxgpt_bench.reproduce.recipes import HUB_SOURCE, RECIPES, Recipe, find_recipe
from small_report import speed_figures

from jaxgpt.shared.console import Result
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.training.model.numerics import choose_numerics
from jaxgpt.training.options import (
    GPT2_VOCAB_SIZE,
    model_config,
    run_config,
    train_config,
    train_options,
)


def options_of(flags: tuple[Any, ...]) -> dict[str, Any]:
    return {
        flag.lstrip("-").replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)
    }


RECIPE = Recipe(
    about="of the tests",
    offline_source="stdlib",
    tokenizer="bpe:384",
    val_fraction=0.1,
    train={"preset": "tiny", "cpu_devices": 2, **options_of(TINY_SHAPE), **options_of(TINY_TRAIN)},
    qat=None,
    quality_tokens=1024,
    parse_samples=2,
    parse_tokens=8,
    tokens=16,
    rounds=1,
)  # fmt: skip


def fill(out: Path, **folders: Path) -> Path:
    """Lay folders of the single commands out as `reproduce` lays them out."""
    for name, folder in folders.items():
        shutil.copytree(folder, out / name.replace("_", "-"))
    return out


@pytest.fixture(scope="module")
def filled(
    data: Path, run: Path, fp32: Path, int8_dynamic: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder that the single commands filled."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    return fill(out, data=data, run=run, fp32=fp32, int8_dynamic=int8_dynamic)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tests' recipe as preset "tests", one method, no minutes of speed; gives the calls for speed."""
    asked: list[Any] = []

    def generate(options: Any) -> Any:
        asked.append(options)
        return Result(speed_figures())

    monkeypatch.setitem(RECIPES, "tests", RECIPE)
    monkeypatch.setattr(build_module, "QUANTIZED", build_module.QUANTIZED[:1])
    monkeypatch.setattr(measure_module, "generate", generate)
    return asked


def kept(out: Path) -> dict[str, bool]:
    """Whether each stage of the last call was kept."""
    log = json.loads((out / "report.json").read_text())["stages"]
    names = {entry["stage"] for entry in log}
    return {name: all(entry["kept"] for entry in log if entry["stage"] == name) for name in names}


def test_a_folder_of_the_single_commands_is_taken_over_and_every_stage_is_kept_the_second_time(
    command: Command, filled: Path, recipe: list[Any], tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "else.jsonl", rows(40, seed=9))
    before = {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()}
    call = ("reproduce", "tests", "--out", filled, "--other-text", f"{other}=rows of another seed")
    code, _, said = command("jaxgpt-bench", *call)
    assert code == 0, said
    assert "[train] kept" in said
    state = kept(filled)
    assert all(state[name] for name in ("data", "train", "convert", "quantize"))
    assert not any(state[name] for name in ("quality", "samples", "memorization", "speed"))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())  # nothing was written anew

    report = json.loads((filled / "report.json").read_text())
    assert [row["name"] for row in report["models"]] == ["flax-fp32", "torch-fp32", "int8-dynamic"]
    assert [row["fastest"]["engine"] for row in report["models"]] == [
        "jaxgpt-flax",
        "jaxgpt-torch",
        "jaxgpt-native",
    ]
    run_config = json.loads((filled / "run" / "config.json").read_text())
    assert report["train"]["settings"] == run_config["train"]
    assert report["memorization"]["overlap"]["sharing"] == 0
    assert report["memorization"]["overlap"]["documents"] == report["data"]["counts"]["val_documents"]
    assert len(report["samples"]) == len(FIXED_PROMPTS) * 2 * 2
    assert {row["model"] for row in report["samples"]} == {"torch-fp32", "int8-dynamic"}
    for row in report["samples"]:
        assert row["verbatim"]["tokens"] <= row["tokens"]
        assert row["verbatim"]["text"] in row["text"] or "\ufffd" in row["verbatim"]["text"]
    (text,) = report["other_text"]
    assert (text["file"], text["about"], text["documents"]) == ("else.jsonl", "rows of another seed", 40)
    assert [row["name"] for row in text["rows"]] == [row["name"] for row in report["models"]]
    page = (filled / "report.html").read_text()
    assert "else.jsonl" in page
    assert "not the earlier project's data set" in page

    assert command("jaxgpt-bench", *call)[0] == 0
    assert all(kept(filled).values())
    assert len(recipe) == 1
    assert command("jaxgpt-bench", *call, "--redo", "speed")[0] == 0
    assert [name for name, was_kept in kept(filled).items() if not was_kept] == ["speed"]
    assert len(recipe) == 2


@pytest.mark.slow
def test_the_quantization_aware_training_is_taken_over_too(
    command: Command, data: Path, run: Path, fp32: Path, qat_run: Path, qat_fp32: Path, int8_static_qat: Path,
    recipe: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    out = fill(tmp_path / "out", data=data, run=run, fp32=fp32, qat=qat_run, fp32_qat=qat_fp32,
               int8_static_qat=int8_static_qat)  # fmt: skip
    qat = {"preset": "tiny", **options_of(TINY_TRAIN), "max_steps": 10, "learning_rate": 0.001}
    monkeypatch.setitem(RECIPES, "tests", dataclasses.replace(RECIPE, qat=qat))
    two = (build_module.QUANTIZED[0], build_module.QUANTIZED[2])
    monkeypatch.setattr(build_module, "QUANTIZED", two)
    code, _, said = command("jaxgpt-bench", "reproduce", "tests", "--out", out)
    assert code == 0, said
    assert kept(out)["qat"]
    assert kept(out)["convert"]
    assert said.count("[quantize] kept") == 1
    report = json.loads((out / "report.json").read_text())
    models = {row["name"]: row for row in report["models"]}
    parent, row = models["int8-static-qat"]["parent"], models["int8-static-qat"]
    assert parent["name"] == "fp32-qat"
    assert parent["difference"] == pytest.approx(row["val_loss"] - models["fp32-qat"]["val_loss"])
    assert parent["kl_mean"] < row["kl_mean"]
    assert models["fp32-qat"]["fastest"] is None
    assert [name for name in models if "parent" in models[name]] == ["int8-static-qat"]


def test_an_altered_artifact_is_made_again_and_what_was_measured_on_equal_weights_stays(
    command: Command, filled: Path, recipe: list[Any]
) -> None:
    assert command("jaxgpt-bench", "reproduce", "tests", "--out", filled)[0] == 0
    weights = filled / "int8-dynamic" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    whole, content[-1] = bytes(content), content[-1] ^ 1
    weights.write_bytes(content)
    code, _, said = command("jaxgpt-bench", "reproduce", "tests", "--out", filled)
    assert code == 0, said
    assert "int8-dynamic was altered (model.safetensors)" in said
    assert weights.read_bytes() == whole
    assert [name for name, was_kept in kept(filled).items() if not was_kept] == ["quantize"]


def test_another_training_or_data_set_in_the_folder_is_one_line_and_nothing_is_touched(
    command: Command, filled: Path, recipe: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted((filled / "run").rglob("*"))
    call = ("jaxgpt-bench", "reproduce", "tests", "--out", filled)
    code, _, said = command(*call, "--max-steps", 30)
    assert code == 2
    assert "max_steps was 40, now 30" in said.splitlines()[-1]
    code, _, said = command(*call, "--source", "stdlib")
    assert code == 2
    assert "source was" in said.splitlines()[-1]
    assert sorted((filled / "run").rglob("*")) == before


def test_bad_options_are_one_line(command: Command, recipe: list[Any], run: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> tuple[int, str, str]:
        result = command("jaxgpt-bench", "reproduce", *arguments, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return result

    assert_one_line_error(refused("cpuu"), "'cpuu'", "did you mean cpu or gpu?")
    assert_one_line_error(refused("cpu", "--max-steps", 0), "--max-steps (0)")
    assert_one_line_error(refused("cpu", "--rounds", 0), "--rounds (0)")
    assert_one_line_error(refused("cpu", "--threads", -1), "--threads (-1)")
    assert_one_line_error(refused("cpu", "--run", run, "--source", "stdlib"), "--run brings")
    assert_one_line_error(refused("cpu", "--other-text", tmp_path / "no.jsonl"), "no.jsonl is no file")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"code": "x"}\n')
    assert_one_line_error(refused("cpu", "--other-text", wrong), "no column 'text'")
    wrong.write_text('{"text": "  "}\n')
    assert_one_line_error(refused("cpu", "--other-text", wrong), "holds no text")
    readme = tmp_path / "README.md"
    readme.write_text("no table")
    assert_one_line_error(refused("cpu", "--readme", readme), "reproduction: begin")


def test_a_given_run_brings_its_data_and_must_be_finished(run: Path, data: Path, tmp_path: Path) -> None:
    found = stages.Stages()
    dataset, folder = build_module.taken_run(run, found)
    assert (dataset.folder, folder) == (data, run)
    assert [entry.stage for entry in found.log] == ["data", "train"]
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished)
    (unfinished / "summary.json").unlink()
    with pytest.raises(UserError, match="summary of a finished run"):
        build_module.taken_run(unfinished, found)
    shutil.copy(run / "summary.json", unfinished)
    config = unfinished / "config.json"
    config.write_text(re.sub(r'"manifest_sha256": "\w+"', '"manifest_sha256": "0"', config.read_text()))
    with pytest.raises(UserError, match="is not the data set"):
        build_module.taken_run(unfinished, found)


@pytest.mark.parametrize("name", ["smoke", "cpu", "answers", "mixed", "gpu"])
def test_every_preset_is_a_training_that_can_be(name: str, data: Path, tmp_path: Path) -> None:
    dataset, chosen = open_dataset(data), RECIPES[name]
    for settings in filter(None, (chosen.train, chosen.qat)):
        config = run_config(train_options(data=data, out=tmp_path, **settings), dataset)
        assert config.train.max_steps == settings["max_steps"]
        assert config.model.block_size >= chosen.tokens  # the speed measurement fits
        if name == "gpu":  # a micro-batch splits over one, two, four or eight GPUs
            assert config.train.batch_size // config.train.grad_accum_steps % 8 == 0
    assert chosen.parse_samples >= 20
    assert find_recipe(name, 7).train["max_steps"] == 7


def test_without_the_hub_the_offline_text_is_taken_and_never_called_the_other(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def unreachable(name: str) -> Any:
        raise UserError("the hub can't be reached")

    monkeypatch.setattr("jaxgpt.data.sources.open_source", unreachable)
    assert build_module.choose_source("auto", RECIPES["cpu"]) == recipes.PACKAGES
    assert "NOT the earlier project's data" in capfd.readouterr().err
    assert build_module.choose_source("offline", RECIPES["smoke"]) == "stdlib"
    assert build_module.choose_source("mine.jsonl", RECIPES["cpu"]) == "mine.jsonl"
    monkeypatch.setattr("jaxgpt.data.sources.open_source", lambda name: None)
    assert build_module.choose_source("auto", RECIPES["cpu"]) == HUB_SOURCE
    assert is_earlier_data(f"{HUB_SOURCE}@abc")
    assert not any(is_earlier_data(name) for name in ("stdlib", "hub:other/set", recipes.PACKAGES, "x.jsonl"))


def test_a_measurement_is_kept_only_where_it_was_made_from_the_same(tmp_path: Path) -> None:
    path, asked = tmp_path / "quality.json", []

    def measure() -> dict[str, Any]:
        asked.append(1)
        return {"figure": len(asked)}

    def figure(made_from: dict[str, Any], *redo: str) -> int:
        return int(stages.Stages(redo).measured(path, made_from, measure)["figure"])

    assert figure({"model": "a", "prompts": ("x",)}) == 1
    assert figure({"model": "a", "prompts": ("x",)}) == 1
    assert figure({"model": "b", "prompts": ("x",)}) == 2
    path.write_text(path.read_text()[:-20])  # a half-written file counts for nothing
    assert figure({"model": "b", "prompts": ("x",)}) == 3
    assert figure({"model": "b", "prompts": ("x",)}, "quality") == 4
    assert figure({"model": "b", "prompts": ("x",)}, "speed") == 4


def test_longest_runs_are_those_of_a_search_by_hand() -> None:
    draw = np.random.default_rng(0)
    corpus = draw.integers(0, 4, 600).astype(np.uint16)
    texts = [draw.integers(0, 5, size).tolist() for size in (1, 2, 7, 40, 120)]
    texts += [corpus[100:160].tolist(), [9, 9], [], [9, *corpus[5:30].tolist(), 9]]
    haystack = bytes(corpus.tolist())
    for text, (start, length) in zip(texts, longest_runs(Corpus(corpus), texts), strict=True):
        occurring = [
            end - begin
            for begin in range(len(text))
            for end in range(begin + 1, len(text) + 1)
            if bytes(text[begin:end]) in haystack
        ]
        assert length == max(occurring, default=0)
        assert bytes(text[start : start + length]) in haystack


def test_overlap_counts_documents_and_no_run_crosses_two() -> None:
    end = 7
    train = np.array([end, 1, 2, 3, 4, 5, end, 6, 6, 1, end], np.uint16)
    val = np.array([end, 9, 2, 3, 4, end, 4, 5, end, 6, 6, 5, end, 2, 3, 4, 5, 1, 2, 3, end], np.uint16)
    corpus = Corpus(train)
    assert overlap(corpus, val, end, 3) == {"documents": 4, "sharing": 2, "too_short": 1}
    assert overlap(corpus, val, end, 2) == {"documents": 4, "sharing": 4, "too_short": 0}
    # 4 5 <end> 6 6 stands in both, over an end
    assert overlap(corpus, val, end, 5) == {"documents": 4, "sharing": 0, "too_short": 3}


def test_the_gpu_preset_s_attention_is_cudnn_s_where_the_gpu_has_it() -> None:
    options = train_options(data=Path("data"), out=Path("run"), **dict(RECIPES["gpu"].train))
    model = model_config(dataclasses.replace(options.model, vocab_size=GPT2_VOCAB_SIZE))
    for precision, capability, flash in (("bf16", 8.0, True), ("fp16", 7.5, False)):
        train = train_config(dataclasses.replace(options.training, precision=precision))
        assert choose_numerics(model, train, "gpu", capability)[0].flash is flash
