"""The preset that trains on requests with programs: its text, and what is asked at the end."""

import dataclasses
import json
from pathlib import Path

import jaxgpt_bench.evaluate.command as evaluate_module
import jaxgpt_bench.reproduce.measure as measure_module
import pytest
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.evaluate.page import answers_block
from jaxgpt_bench.evaluate.requests import REQUESTS
from jaxgpt_bench.evaluate.rows import Answer, AnswersRow, EvaluateFigures, Speed
from jaxgpt_bench.quality.samples import val_documents
from jaxgpt_bench.reproduce.build import Built, prepared, reading_options
from jaxgpt_bench.reproduce.checks import check_source
from jaxgpt_bench.reproduce.figures import TrainingText
from jaxgpt_bench.reproduce.page.claims import TextKind, text_kind
from jaxgpt_bench.reproduce.page.render import markdown_block
from jaxgpt_bench.reproduce.recipes import ANSWERS_PACKAGES, RECIPES, packages_source
from jaxgpt_bench.reproduce.stages import Stages

from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import load_tokenizer

HELD_OUT = '''
def fact(number):
    """Compute the factorial of a number."""
    return number * fact(number - 1)
'''
FUNCTION = '''
def add_{name}(number):
    """Add {name} to a number."""
    return number + {place}
'''


RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def test_packages_that_it_reads_stand_in_one_file_with_their_versions() -> None:
    lines = ANSWERS_PACKAGES.read_text(encoding="utf-8").splitlines()
    source = RECIPES["answers"].offline_source
    names = source.removeprefix("packages:").split(",")
    assert len(names) == len(set(names)) > 600
    assert all(name.isidentifier() for name in names)
    requirements = [line.split("#")[0].strip() for line in lines]
    pinned = [line.split("==")[0].lower() for line in requirements if line]
    assert len(pinned) == len(set(pinned))
    assert all(line.count("==") == 1 for line in requirements if line)
    shown = packages_source("## a remark\n# stdlib\nsome-thing==1.0  # thing\nits-other-half==1.0\n")
    assert shown == "packages:stdlib,thing"


def test_packages_that_are_not_there_are_refused_with_the_way_to_get_them() -> None:
    with pytest.raises(UserError, match=r"not installed.*-r .*answers-packages\.txt.*PYTHONPATH=packages"):
        check_source(RECIPES["answers"].offline_source)
    with pytest.raises(UserError, match=r"importable names, such as packages:numpy,jax$"):
        check_source("packages:no_such_package")


def test_its_text_is_requests_without_those_that_are_asked_and_the_second_time_it_is_kept(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "fact.py").write_text(HELD_OUT)
    names = [a + b for a in ("one", "two", "six", "ten", "red") for b in ("", "fold", "teen", "th")]
    for place, name in enumerate(names):
        (source / f"{name}.py").write_text(FUNCTION.format(name=name, place=place))
    recipe = dataclasses.replace(RECIPES["answers"], tokenizer="bpe:300", val_fraction=0.3)
    stages, folder = Stages(), tmp_path / "data"
    dataset = prepared(stages, folder, str(source), recipe)
    tokenizer = load_tokenizer(folder)
    documents = [text for part in (dataset.train, dataset.val) for text in val_documents(part, tokenizer)]
    assert len(documents) > len(names)
    assert all("\n```python\ndef add_" in document for document in documents)
    assert not any("factorial" in document for document in documents)
    assert dataset.manifest["counts"]["held_out_pairs"] > 0
    assert (tmp_path / "held_out.txt").read_text().splitlines() == [request.text for request in REQUESTS]
    assert prepared(stages, folder, str(source), recipe).sha256 == dataset.sha256
    assert stages.log[-1].kept
    with pytest.raises(UserError, match="code was requests, now pairs"):
        prepared(stages, folder, str(source), dataclasses.replace(recipe, answers=False))


def test_documentation_is_read_of_packages_alone(tmp_path: Path) -> None:
    mixed, held_out = RECIPES["mixed"], tmp_path / "held_out.txt"
    of_packages = reading_options(mixed, "packages:numpy", held_out)
    assert of_packages["answers_only"] is True
    assert of_packages["code"] == "requests"
    assert "*.md" in of_packages["include"]
    assert held_out.read_text().startswith(REQUESTS[0].text)
    of_rows = reading_options(mixed, "hub:some/rows", held_out)
    assert of_packages.keys() - of_rows.keys() == {"include", "exclude", "skip_errors"}
    assert "include" not in reading_options(RECIPES["answers"], "packages:numpy", held_out)
    assert reading_options(RECIPES["cpu"], "packages:numpy", held_out) == {}


def test_float32_and_int8_are_asked_the_same_once(
    data: Path, run: Path, fp32: Path, int8_dynamic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "LONGEST", 4)
    monkeypatch.setattr(measure_module, "ANSWERING", (fp32.name, int8_dynamic.name))
    built = Built(open_dataset(data), run, [fp32, int8_dynamic], None)
    for _ in range(2):
        stages = Stages()
        measure_module.measure_answers(stages, tmp_path, built)
    assert [(entry.stage, entry.kept) for entry in stages.log] == [("answers", True)]
    rows = json.loads((tmp_path / "answers.json").read_text())["answers"]
    asked = {(row["kind"], row["prompts"], row["temperature"], row["seed"]) for row in rows}
    assert len(asked) == len(rows) == 2 * 2 * (measure_module.DRAWS + 1)
    assert {len(row["answers"]) for row in rows if row["prompts"] == "requests"} == {len(REQUESTS)}
    assert "### Python program to calculate the average" in (tmp_path / "answers.md").read_text()


def test_the_page_says_first_where_answers_are_poor_and_shows_both_models() -> None:
    answer = Answer(
        prompt="Add one", text="\ndef f(x):\n    return x", finish_reason="length", parses=True,
        function="f", passed=False, why="AssertionError", most_repeated=6,
    )  # fmt: skip
    right = dataclasses.replace(answer, prompt="Do nothing", passed=True, why="passed", most_repeated=2)
    rows = [
        AnswersRow(
            model=kind, kind=kind, prompts="requests", temperature=temperature,
            answers=(answer, right if kind == "fp32" else answer),
            speed=Speed(tokens_per_s=1.0, characters_per_s=2.0),
        )
        for temperature in (0.8, 0.0) for kind in ("fp32", "int8-dynamic")
    ]  # fmt: skip
    figures = EvaluateFigures(answers=tuple(rows), settings={}, **vars(provenance()))
    block = answers_block(EvaluateFigures.from_json(json.loads(json.dumps(figures.to_json()))))
    assert block.startswith(
        "Read this first: of 2 answers, 2 in float32, 2 in INT8 are Python with a function whose name fits; "
        "1 in float32, 0 in INT8 **pass their check**."
    )
    assert "Greedy, 1 in float32, 2 in INT8 repeat" in block.splitlines()[0]
    assert block.count("### Add one") == 1
    assert block.count("temperature 0.8: parses, defines `f`, cut") == 4


def test_of_several_draws_the_page_has_the_mean_and_shows_the_first() -> None:
    def row(fits: int, seed: int) -> AnswersRow:
        """Return a draw of which so many of three answers fit."""
        answers = tuple(
            Answer(
                prompt=f"Request {place}", text=f"seed {seed}", finish_reason="endoftext", parses=True,
                function="f" if place < fits else "", passed=False, why="", most_repeated=1,
            )
            for place in range(3)
        )  # fmt: skip
        speed = Speed(tokens_per_s=1.0, characters_per_s=2.0)
        return AnswersRow(
            model="m", kind="fp32", prompts="requests", temperature=0.8, min_p=0.05, seed=seed,
            answers=answers, speed=speed,
        )  # fmt: skip

    figures = EvaluateFigures(answers=(row(3, 0), row(2, 1000)), settings={}, **vars(provenance()))
    block = answers_block(figures)
    assert block.startswith("Read this first: of 3 answers (means of 2 draws), 2.5 in float32 are Python")
    assert "| 2.5 of 3 (2 to 3) |" in block
    assert "temperature 0.8, min-p 0.05, drawn with the same random numbers, the first of 2 draws" in block
    assert (block.count("seed 0"), block.count("seed 1000")) == (3, 0)


def test_what_a_model_was_trained_on_is_said_as_it_was_read() -> None:
    def kind(**reading: object) -> TextKind:
        return text_kind(
            TrainingText(
                source="packages:a,b", revision="", tokenizer={}, counts={}, is_the_original_s=False,
                manifest_sha256="", reading=reading,
            )
        )  # fmt: skip

    assert kind() == TextKind(kind="packages", packages=2)
    assert kind(code="requests") == TextKind(kind="packages", packages=2, requests=True)
    mixed = kind(code="requests", include=["*.py", "*.rst"])
    assert mixed == TextKind(kind="packages", packages=2, requests=True, documentation=True)
    assert not kind(include=["a/*.py"]).documentation
    figures = json.loads((RESULTS / "reproduce_mixed.json").read_text())
    assert (
        "tokens of requests with programs, made of functions of 622 installed Python packages, and their "
        "documentation: not the earlier project's data set." in markdown_block(figures)
    )
    assert "better than xz" in markdown_block(figures)
