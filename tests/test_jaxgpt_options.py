"""Options of `jaxgpt train` and `jaxgpt plan`: what help shows, what is taken, what counts as given."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, assert_one_line_error

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.console import parse
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.presets import PRESETS
from jaxgpt.training.options import TrainOptions, train_options
from jaxgpt.training.plan import PlanOptions
from jaxgpt.training.step_memory import StepMemory

FIELDS = [field.name for cls in (ModelConfig, TrainConfig) for field in dataclasses.fields(cls)]
NO_OPTION = {"train": {"vocab_size"}, "plan": {"grad_accum_steps", "remat"}}
PATHS = ("--data", "DATA", "--out", "RUN")


def parsed(*arguments: str) -> TrainOptions:
    options: TrainOptions = parse(TrainOptions, "jaxgpt train", [*arguments, *PATHS])
    return options


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what --help of a command prints, 80 columns wide."""

    def call(*words: str) -> str:
        monkeypatch.setenv("COLUMNS", "80")
        options = TrainOptions if words[0] == "train" else PlanOptions
        with pytest.raises(SystemExit) as stop:
            parse(options, f"jaxgpt {words[0]}", [*words[1:], "--help"])
        assert not stop.value.code
        return capsys.readouterr().out

    return call


def entry(text: str, name: str) -> str:
    """Return what help says of a setting, from its flag to its default, in one line."""
    lines = " ".join(line.strip("│╭╮╰╯─ ") for line in text.splitlines())
    found = re.search(rf"--{name.replace('_', '-')}\b(?!-).*?\((default: .*?|required)\)", lines)
    assert found, f"{name} is not in the help"
    return " ".join(found[0].split())


@pytest.mark.parametrize("command_name", ["train", "plan"])
@pytest.mark.parametrize("preset", PRESETS)
def test_help_of_a_preset_shows_its_own_values(shown: Any, command_name: str, preset: str) -> None:
    text, found = shown(command_name, preset), PRESETS[preset]
    values = {**dataclasses.asdict(found.model(50_257)), **dataclasses.asdict(found.train)}
    if command_name == "train":
        values["precision"] = "what the device is best at"
    for name in FIELDS:
        if name not in NO_OPTION[command_name]:
            assert entry(text, name).endswith(f"(default: {values[name]})")


@pytest.mark.parametrize("command_name", ["train", "plan"])
def test_every_setting_has_an_option_with_the_words_of_its_one_documentation(
    shown: Any, command_name: str
) -> None:
    text = shown(command_name, "gpt2")
    documents = f"{ModelConfig.__doc__}\n{TrainConfig.__doc__}"
    for name in FIELDS:
        words = re.search(
            rf"^      {name}: (.*?)(?=^      \w+: |^\s*$|\Z)", documents, re.MULTILINE | re.DOTALL
        )
        assert words, f"{name} is not documented"
        if name in NO_OPTION[command_name]:
            assert not re.search(rf"--{name.replace('_', '-')}\b", text)
        else:
            assert " ".join(words[1].split()) in entry(text, name)


def test_help_is_80_columns_wide_and_groups_its_options(shown: Any) -> None:
    lines = shown("train", "gpt2").splitlines()
    assert max(map(len, lines)) <= 80
    words = [line.strip("╭╮│─ ") for line in lines]
    titles = [text for text in words if re.fullmatch(r"positional arguments|(\w+ )?options", text)]
    assert titles == [
        "positional arguments", "options", "model options", "training options", "devices options"
    ]  # fmt: skip


@pytest.mark.parametrize("command_name", ["train", "plan"])
def test_help_without_a_preset_names_them_all_and_how_their_values_are_seen(
    shown: Any, command_name: str
) -> None:
    text = shown(command_name)
    words = re.sub(r"[│\s]+", " ", text)
    assert f"Values shown are tiny's; jaxgpt {command_name} gpt2 --help shows gpt2's." in words
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in words for name in PRESETS)


def test_the_preset_is_found_wherever_it_stands() -> None:
    for arguments in (["gpt2"], ["--n-layer", "3", "gpt2"], ["--remat", "gpt2"], ["--seed=1", "gpt2"]):
        assert parsed(*arguments).preset == "gpt2"
    options = parse(TrainOptions, "jaxgpt train", ["--data", "small", "--out", "tiny", "gpt2"])
    assert (options.preset, str(options.out)) == ("gpt2", "tiny")
    assert options.model.n_layer == PRESETS["gpt2"].n_layer


def test_a_preset_that_is_missing_or_unknown_is_one_line(command: Command, tmp_path: Path) -> None:
    for name in ("train", "plan"):
        assert_one_line_error(command("jaxgpt", name), "needs a preset", "tiny", "gpt2-xl")
        assert_one_line_error(command("jaxgpt", name, "tinny"), "'tinny'", "did you mean tiny")


def test_every_spelling_of_a_flag_counts_as_given_and_nothing_else_does() -> None:
    assert parsed("tiny").given == {"data", "out"}
    options = parsed(
        "tiny", "--n_layer=3", "--cooldown", "cosine", "--no-tied", "--seed", "0", "--mesh=data=1"
    )
    assert options.given - {"data", "out"} == {"n_layer", "lr_schedule", "tied", "seed", "mesh"}


@pytest.mark.parametrize(
    ("flag", "name", "expected"),
    [
        ("--tied", "tied", True),
        ("--no-tied", "tied", False),
        ("--qat", "qat", True),
        ("--no-qat", "qat", False),
        ("--remat", "remat", True),
        ("--no-remat", "remat", False),
    ],
)
def test_a_switch_goes_both_ways(flag: str, name: str, expected: bool) -> None:
    options = parsed("tiny", flag)
    assert {**vars(options.model), **vars(options.training)}[name] is expected


def test_what_python_asks_for_is_what_the_command_line_asks_for() -> None:
    there = parsed(
        "small", "--n-layer", "3", "--beta1", "0.8", "--mesh", "fsdp=2", "--init", "A", "--no-tied"
    )
    here = train_options(
        "small",
        data=Path("DATA"),
        out=Path("RUN"),
        n_layer=3,
        beta1=0.8,
        mesh="fsdp=2",
        init=Path("A"),
        tied=False,
        precision=None,
    )
    assert dataclasses.replace(there, given=there.given - {"data", "out"}) == here


def test_python_is_told_of_a_setting_that_there_is_not() -> None:
    with pytest.raises(UserError, match="no setting 'n_layers'; did you mean n_layer"):
        train_options("tiny", data=Path("D"), out=Path("R"), n_layers=3)
    with pytest.raises(UserError, match="no setting 'vocab_size'"):
        train_options("tiny", data=Path("D"), out=Path("R"), vocab_size=3)
    with pytest.raises(UserError, match="did you mean tiny"):
        train_options("tinny", data=Path("D"), out=Path("R"))


def test_the_vocabulary_is_the_data_s_and_no_option_of_a_training(command: Command, data: Path) -> None:
    result = command("jaxgpt", "train", "tiny", "--data", data, "--out", "RUN", "--vocab-size", 512)
    assert_one_line_error(result, "no option '--vocab-size'")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--max-steps", "1e3"), "--max-steps 1e3: expected a whole number, such as 1000"),
        (("--max-steps=2.5",), "--max-steps 2.5: expected a whole number, such as 2"),
        (("--process-count", "two"), "--process-count two: expected a whole number, such as 1000"),
        (("--seed", "inf"), "--seed inf: expected a whole number, such as 1000"),
        (("--beta1", "high"), "--beta1 high: expected a number, such as 0.001"),
    ],
)
def test_a_number_that_is_none_is_one_line(command: Command, arguments: tuple[str, ...], line: str) -> None:
    code, out, err = command("jaxgpt", "train", "tiny", *PATHS, *arguments)
    assert (code, out, err) == (2, "", f"error: {line}\n")


@pytest.mark.parametrize(
    ("flag", "value", "part"),
    [
        ("--beta1", 7, "beta1 (7.0) must lie in [0, 1)"),
        ("--beta2", 1, "beta2 (1.0) must lie in [0, 1)"),
        ("--momentum", -0.5, "momentum (-0.5) must lie in [0, 1)"),
        ("--grad-clip", 0, "grad_clip (0.0) must be above 0"),
        ("--learning-rate", "nan", "learning_rate (nan) must be above 0, and finite"),
        ("--lr-schedule", "bad", "'bad'"),
        ("--n-embd", 33, "n_embd (33)"),
    ],
)
def test_settings_that_can_not_be_are_one_line_of_train_and_plan(
    command: Command, data: Path, tmp_path: Path, flag: str, value: object, part: str
) -> None:
    paths = ("--data", data, "--out", tmp_path / "r")
    assert_one_line_error(command("jaxgpt", "train", "tiny", *paths, flag, value), part)
    assert not (tmp_path / "r").exists()
    assert_one_line_error(command("jaxgpt", "plan", "tiny", flag, value), part)


def test_plan_takes_the_settings_of_a_training_into_account(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of parameters and optimizer, which need no compiled step."""
    monkeypatch.setattr(StepMemory, "peak", lambda self, sequences: self.peaks.setdefault(sequences, 1.0))
    shape = ("--n-layer", 1, "--n-embd", 32, "--n-head", 2, "--vocab-size", 512, "--block-size", 32)
    small = ("plan", "tiny", *shape, "--batch-size", 1, "--json")
    sizes = []
    for more in ((), ("--n-layer", 2), ("--no-tied",), ("--optimizer", "adamw")):
        figures = json.loads(command("jaxgpt", *small, *more)[1])
        sizes.append((figures["params_bytes"], figures["optimizer_bytes"]))
    plain, deeper, untied, adamw = sizes
    block = 12 * 32**2 + 13 * 32
    assert deeper[0] - plain[0] == 4 * block
    assert untied[0] - plain[0] == 4 * 512 * 32
    assert adamw[1] > plain[1]  # two moments of every matrix where Muon has one
