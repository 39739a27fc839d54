"""Prepared, trained, converted, quantized: what a reproduction measures, made where it is not there."""

import dataclasses
import functools
from pathlib import Path

from jaxgpt.shared.dataset import Dataset, open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, sha256_of
from jaxgpt_bench.reproduce.made import (
    QUANTIZED,
    converted,
    made_of_run,
    prepared,
    quantized,
    trained,
    weights_sha256,
)
from jaxgpt_bench.reproduce.memorization import Corpus
from jaxgpt_bench.reproduce.options import ReproduceOptions
from jaxgpt_bench.reproduce.recipes import Recipe
from jaxgpt_bench.reproduce.stages import Stages


@dataclasses.dataclass(frozen=True)
class Built:
    """What is measured.

    Attributes:
      dataset: that the run was trained on.
      run: the run folder.
      artifacts: float32 first.
      qat: the float32 artifact of the training with rounding, of which int8-static-qat was made; only its
        losses are compared, its speed is that of the other.
    """

    dataset: Dataset
    run: Path
    artifacts: list[Path]
    qat: Path | None

    @property
    def compared(self) -> list[Path]:
        """The artifacts whose losses are compared: float32 first, the parent before what was made of it."""
        first, *rest = self.artifacts
        return [first, *([] if self.qat is None else [self.qat]), *rest]

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The training split, to look runs up in."""
        return Corpus(self.dataset.train)

    def hashes(self, artifacts: list[Path]) -> dict[str, str]:
        """Return what tells these models and data from others."""
        weights = {path.name: weights_sha256(path) for path in artifacts}
        return {"data": self.dataset.sha256, "run": sha256_of(self.run / "config.json"), **weights}


def build(options: ReproduceOptions, recipe: Recipe, stages: Stages) -> Built:
    """Prepare, train, convert and quantize, as far as that is not done."""
    options.out.mkdir(parents=True, exist_ok=True)
    if options.run is None:
        dataset = prepared(stages, options.out / "data", options.source, recipe)
        run = trained(stages, "train", options.out / "run", dict(recipe.train), dataset)
    else:
        dataset, run = taken_run(options.run, stages)
    fp32 = converted(stages, options.out / "fp32", run, dataset)
    parents = {"fp32": fp32}
    if recipe.qat is not None:
        settings = {**recipe.qat, "init": run, "qat": True}
        qat = trained(stages, "qat", options.out / "qat", settings, dataset)
        parents["fp32-qat"] = converted(stages, options.out / "fp32-qat", qat, dataset)
    artifacts = [
        quantized(stages, options.out / name, method, parents[parent], dataset)
        for name, method, parent in QUANTIZED
        if parent in parents
    ]
    return Built(dataset, run, [fp32, *artifacts], parents.get("fp32-qat"))


def taken_run(run: Path, stages: Stages) -> tuple[Dataset, Path]:
    """Return a given run and its data set.

    Raises:
      UserError: it is not finished, or its data set is gone or another one.
    """
    from jaxgpt.training.run.folder import open_run

    data = open_run(run).config.data
    read_json(run / "summary.json", "summary of a finished run")
    dataset = open_dataset(Path(data["folder"]))
    if dataset.sha256 != data["manifest_sha256"]:
        raise UserError(
            f"{dataset.folder} is not the data set that {run} was trained on; bring that one back"
        )
    stages.kept("data", f"{dataset.folder} is that of --run {run}", dataset.manifest)
    stages.kept("train", f"--run {run}", made_of_run(run))
    return dataset, run
