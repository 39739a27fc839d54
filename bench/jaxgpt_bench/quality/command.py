"""`jaxgpt-bench quality`: one table of models on identical tokens.

    jaxgpt-bench quality --run RUN --artifact FP32 INT8 ... --data DATA

The first row (the run's Flax model, or the first artifact) is the reference of the others. Loss is over
the whole validation split, or over windows spread evenly over it; samples continue the same prompts with the
same random numbers. Beside them the held-out documents' own code is parsed, cut at the same length.

With --peers the engine, with the cache it generates with, and every other program that `jaxgpt-bench
generate` measures are rows too, each as it runs there: another program's 8 and 4 bits beside this project's,
on the same tokens against the same float32 model.

The float32 artifact of a quantization-aware training is the row fp32-qat. int8-static-qat is compared with it
too: that is what its integers cost, apart from what the further training changed.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import ClassVar

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """Compare models on identical tokens.

    Attributes:
      artifact: artifact folders, float32 first; that of a quantization-aware training before what was made
        of it.
      data: dataset folder whose validation split is measured.
      run: run folder: its Flax model becomes the reference.
      step: of the run: best, latest, or a stored step.
      tokens: of the validation split, in whole windows spread evenly over it; 0 for all.
      samples: texts to generate from each model.
      sample_tokens: length of a sample at most.
      peers: also the engine as it generates, and every other program that is installed, or only those that
        are named, in each of its precisions; they take tokens one at a time and write no samples.
      out: also write the figures into this JSON file.
      table: text whose table between the markers `<!-- quality: begin -->` and `end` is written anew.
      json: print one JSON document with all figures on stdout.
    """

    RENAMED: ClassVar[dict[str, str]] = {"--peer": "--peers"}  # as `generate` has both

    artifact: tuple[Path, ...]
    data: Path
    run: Path | None = None
    step: str = "best"
    tokens: int = 0
    samples: int = 24
    sample_tokens: int = 200
    peers: tuple[str, ...] | None = None
    out: Path | None = None
    table: Path | None = None
    json: bool = False


def quality(options: QualityOptions) -> Result:
    """Run `jaxgpt-bench quality`."""
    from jaxgpt.shared.dataset import open_dataset
    from jaxgpt_bench.common.markdown_blocks import require_markers, write_between_markers
    from jaxgpt_bench.common.tables import computed_by
    from jaxgpt_bench.quality.contestants import open_models
    from jaxgpt_bench.quality.measure import markdown_block, measure_quality_of, quality_table

    for name, least in (("tokens", 0), ("samples", 0), ("sample_tokens", 1)):
        if (value := getattr(options, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be at least {least}")
    prepare_output_file(options.out)
    if options.table is not None:
        require_markers(options.table, "quality")
    dataset = open_dataset(options.data)
    models = open_models(options.artifact, dataset, options.run, options.step)
    with contextlib.ExitStack() as stack:
        left_out = None
        if options.peers is not None:
            from jaxgpt_bench.quality.programs import open_programs

            programs, left_out = stack.enter_context(open_programs(options.artifact, options.peers))
            models = dataclasses.replace(models, models=[*models.models, *programs])
        figures = measure_quality_of(
            models, dataset, options.tokens, options.samples, options.sample_tokens, left_out
        )
    stderr.print(quality_table(figures).terminal())
    say(f"logits by {computed_by(figures.rows)}")
    written = figures.to_json()
    if options.out is not None:
        write_json(options.out, written)
    if options.table is not None:
        write_between_markers(options.table, "quality", markdown_block(figures))
    return Result(written)
