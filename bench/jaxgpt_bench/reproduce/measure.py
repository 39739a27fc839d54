"""What a reproduction measures: quality, samples, text from elsewhere, memorization, speed."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxgpt_export.format.generation_config import read_generation_config
from jaxgpt_export.native.library import library_path

from jaxgpt.shared.console import say
from jaxgpt.shared.files import sha256_of, write_json
from jaxgpt_bench.common.provenance import describe_machine
from jaxgpt_bench.evaluate.command import EvaluateOptions, Task, evaluate, settings_of, with_sampling
from jaxgpt_bench.evaluate.requests import REQUESTS
from jaxgpt_bench.quality.command import QualityOptions, quality
from jaxgpt_bench.quality.contestants import ComparedModels, open_models
from jaxgpt_bench.quality.measure import SPREAD
from jaxgpt_bench.quality.samples import FIXED_PROMPTS, SEED, TEMPERATURES, fixed_samples
from jaxgpt_bench.reproduce.build import Built
from jaxgpt_bench.reproduce.memorization import word_for_word
from jaxgpt_bench.reproduce.minutes.costs import DRAWS
from jaxgpt_bench.reproduce.options import ReproduceOptions
from jaxgpt_bench.reproduce.other_text import OtherText, loss_on
from jaxgpt_bench.reproduce.recipes import Recipe
from jaxgpt_bench.reproduce.stages import Stages, read_figures
from jaxgpt_bench.speed.command import generate
from jaxgpt_bench.speed.options import SpeedOptions

# Other programs that read the float32 artifact as it is: with --minutes those alone are measured.
WITHOUT_CONVERSION = ("transformers", "torch-quantize-dynamic")
ANSWERING = ("fp32", "int8-dynamic")  # folders of the models that answer requests
SAMPLED = ("torch-fp32", "int8-dynamic")  # models that continue the fixed prompts


def measure(
    options: ReproduceOptions, recipe: Recipe, stages: Stages, built: Built, others: list[OtherText]
) -> dict[str, Any]:
    """Measure what was built, as far as that is not done; speed last."""
    hashes, out = built.hashes(built.compared), options.out

    @functools.cache
    def opened() -> ComparedModels:
        return open_models(built.compared, built.dataset, built.run, "best")

    asked = QualityOptions(
        tuple(built.compared),
        built.dataset.folder,
        built.run,
        tokens=recipe.quality_tokens,
        samples=recipe.parse_samples,
        sample_tokens=recipe.parse_tokens,
    )
    amount = {key: getattr(asked, key) for key in ("tokens", "samples", "sample_tokens")}
    found: dict[str, Any] = {
        "quality": stages.measured(
            out / "quality.json",
            {**hashes, **amount, "windows": SPREAD},
            lambda: dict(quality(asked).figures),
        )
    }
    fixed = {
        "seed": SEED,
        "temperatures": TEMPERATURES,
        "prompts": FIXED_PROMPTS,
        "tokens": recipe.sample_tokens,
    }
    found["samples"] = stages.measured(
        out / "samples.json",
        {**built.hashes(built.artifacts), **fixed},
        lambda: sampled(opened(), recipe.sample_tokens),
    )
    if recipe.answers:
        measure_answers(stages, out, built)
    found["other_text"] = [
        *(measure_other(other, stages, out, hashes, opened, built) for other in others),
        *earlier_others(stages, out, hashes, [other.sha256 for other in others]),
    ]
    made_from = {"data": hashes["data"], "samples": sha256_of(out / "samples.json"),
                 "quality": sha256_of(out / "quality.json")}  # fmt: skip
    found["memorization"] = stages.measured(
        out / "memorization.json", made_from,
        lambda: word_for_word(
            built.corpus, built.dataset, opened().tokenizer, found["samples"], found["quality"]
        ),
    )  # fmt: skip
    found["speed"] = measure_speed(options, recipe, stages, built)
    return found


def sampled(compared: ComparedModels, tokens: int) -> dict[str, Any]:
    """Let the float32 and the INT8 model continue the fixed prompts."""
    chosen = [model for model in compared.models if model.name in SAMPLED]
    return fixed_samples(chosen, compared.tokenizer, tokens)


def measure_answers(stages: Stages, out: Path, built: Built) -> None:
    """Ask float32 and INT8 the requests and held-out docstrings; writes answers.json and answers.md."""
    asked = tuple(path for path in built.artifacts if path.name in ANSWERING)
    tasks: tuple[Task, ...] = ("requests", "docstrings")
    options = with_sampling(
        EvaluateOptions(asked, tasks, built.dataset.folder, draws=DRAWS, page=out / "answers.md")
    )
    requests = [dataclasses.asdict(request) for request in REQUESTS]
    stages.measured(
        out / "answers.json",
        {
            **built.hashes(list(asked)),
            **({"generation": said} if (said := read_generation_config(asked[0])) else {}),
            "requests": requests,
            **settings_of(options),
        },
        lambda: dict(evaluate(options).figures),
    )


def measure_other(
    other: OtherText,
    stages: Stages,
    out: Path,
    hashes: dict[str, str],
    opened: Callable[[], ComparedModels],
    built: Built,
) -> dict[str, Any]:
    """Measure the loss on text from elsewhere, as far as that is not done; name and words are the given."""
    path = out / f"other-text-{other.sha256[:12]}.json"

    def measure() -> dict[str, Any]:
        return loss_on(other, opened(), built.corpus).to_json()

    figures = stages.measured(path, {**hashes, "file": other.sha256}, measure, "other-text")
    given = {"file": other.path.name, "about": other.about}
    if any(figures[key] != given[key] for key in given):
        figures = {**figures, **given}
        write_json(path, figures)
    return {key: value for key, value in figures.items() if key != "made"}


def earlier_others(
    stages: Stages, out: Path, hashes: dict[str, str], given: list[str]
) -> list[dict[str, Any]]:
    """Return what earlier calls measured on these models, on files that are not given this time.

    Args:
      stages: where it is noted.
      out: folder of everything.
      hashes: of models and data.
      given: hashes of the files that are given.
    """
    found = []
    for path in sorted(out.glob("other-text-*.json")):
        file = read_figures(path).get("made_from", {}).get("file")
        if file in given:
            continue
        figures = stages.earlier(path, {**hashes, "file": file})
        if figures is None:
            say(f"[{path.stem}] left out of the report; give its file with --other-text to measure it anew")
        else:
            say(f"[{path.stem}] stays in the report; remove {path} to leave it out")
            found.append({key: value for key, value in figures.items() if key != "made"})
    return found


def measure_speed(options: ReproduceOptions, recipe: Recipe, stages: Stages, built: Built) -> dict[str, Any]:
    """Measure tokens a second of every model and of the programs that compete, on this machine."""
    machine, engine = describe_machine(), library_path()
    asked = SpeedOptions(
        artifact=tuple(built.artifacts),
        run=built.run,
        tokens=recipe.tokens,
        threads=options.threads,
        rounds=options.rounds or recipe.rounds,
        peers=options.minutes is None,
        peer=() if options.minutes is None else WITHOUT_CONVERSION,
    )
    settings = {
        **({"peers": asked.peer} if asked.peer else {}),
        "tokens": asked.tokens,
        "threads": asked.threads,
        "rounds": asked.rounds,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "python": machine.python,
        **machine.packages,
        "engine": sha256_of(engine) if engine.exists() else None,
    }
    threads = torch.get_num_threads()
    try:
        return stages.measured(
            options.out / "speed.json",
            {**built.hashes(built.artifacts), **settings},
            lambda: dict(generate(asked).figures),
        )
    finally:
        torch.set_num_threads(threads)
