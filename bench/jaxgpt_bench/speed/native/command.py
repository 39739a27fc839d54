"""`jaxgpt-bench native`: what the native engine does beyond plain steps, on a trained model.

    jaxgpt-bench native --artifact runs/tiny-int8 --reference runs/tiny-fp32 --data data/stdlib

One process, one model, rounds interleaved: greedy steps that read the whole head, and with its screen; with
drafted tokens, beside the same texts without; several texts side by side; and the earlier project's way,
transformers in float32 without KV cache, every logit. Also how soon the first token comes and what memory
that takes (in a fresh process), and how far its logits are from the PyTorch module's, with float32 keys and
values and with the cache's own.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json

if TYPE_CHECKING:
    from jaxgpt_export.format.artifact import Artifact

    from jaxgpt.shared.dataset import Dataset

PROMPT_TOKENS = 48
PARITY_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class NativeOptions:
    """Measure the native engine on a trained model.

    Attributes:
      artifact: a quantized artifact.
      reference: the float32 artifact that it comes from: its difference is the quantization error.
      data: dataset folder; prompts are taken from its validation split.
      prompts: how many texts are continued in each round.
      tokens: to generate for each.
      batch: texts side by side.
      draft_tokens: tokens that are drafted at most (prompt lookup).
      rounds: in each of which every way runs once.
      threads: CPU threads; 0 takes all cores that this process may use.
      accept_noise: take the figures for tables however busy the machine is; the JSON file says so.
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    RENAMED: ClassVar[dict[str, str]] = {"--guess": "--draft-tokens"}

    artifact: Path
    reference: Path
    data: Path
    prompts: int = 4
    tokens: int = 250
    batch: int = 8
    draft_tokens: int = 8
    rounds: int = 5
    threads: int = 0
    accept_noise: bool = False
    out: Path | None = None
    json: bool = False


def native(options: NativeOptions) -> Result:
    """Run `jaxgpt-bench native`."""
    if min(options.prompts, options.batch, options.draft_tokens, options.rounds) < 1 or options.tokens < 2:
        raise UserError(
            "--prompts, --batch, --draft-tokens and --rounds must be at least 1, --tokens at least 2"
        )
    import numpy as np
    from jaxgpt_export.format.artifact import read_certified_artifact
    from jaxgpt_export.generation.open_session import choose_threads
    from jaxgpt_export.native.native_model import NativeModel

    from jaxgpt.shared.dataset import open_dataset
    from jaxgpt_bench.common.provenance import provenance
    from jaxgpt_bench.noise.meter import NoiseMeter
    from jaxgpt_bench.noise.verdict import warn
    from jaxgpt_bench.speed.native.figures import load_figures, parity_figures
    from jaxgpt_bench.speed.native.rounds import NativeRounds

    prepare_output_file(options.out)
    threads = choose_threads(options.threads)
    dataset = open_dataset(options.data)
    artifact, reference = map(read_certified_artifact, (options.artifact, options.reference))
    _require_fitting(options, artifact, reference, dataset)
    count = min(options.tokens, artifact.config.block_size - PROMPT_TOKENS)
    starts = np.linspace(0, len(dataset.val) - PARITY_TOKENS - 1, options.prompts + 1).astype(int)
    prompts = [dataset.val[at : at + PROMPT_TOKENS].tolist() for at in starts[:-1]]
    text = dataset.val[: min(PARITY_TOKENS, artifact.config.block_size)].astype(np.int64)
    model = NativeModel(artifact, threads)
    rounds = NativeRounds(
        model, reference, artifact.tokenizer(), prompts, count, options.batch, options.draft_tokens, threads
    )
    load = load_figures(options.artifact, threads)
    parity = parity_figures(model, artifact, reference, text)
    meter = NoiseMeter()
    measured = rounds.measure(options.rounds)
    noise = meter.noise(measured["bandwidth_gb_s"], options.accept_noise)
    figures = {
        **provenance(noise).to_json(),
        "settings": {
            "artifact": artifact.kind,
            "model": dataclasses.asdict(artifact.config),
            "prompts": options.prompts,
            "prompt_tokens": PROMPT_TOKENS,
            "tokens": count,
            "threads": threads,
            "isa": model.isa,
        },
        "load": load,
        "parity": parity,
        **measured,
    }
    show(figures)
    warn(noise)
    if options.out is not None:
        write_json(options.out, figures)
    return Result(figures)


def show(figures: dict[str, Any]) -> None:
    """Say what was measured, and with which instruction set."""
    say(f"instruction set: {figures['settings']['isa']}")
    for name in ("load", "parity", "screen", "guess", "batch", "original_way", "ceiling"):
        say(f"{name}: {json.dumps(figures[name])}")


def _require_fitting(
    options: NativeOptions, artifact: "Artifact", reference: "Artifact", dataset: "Dataset"
) -> None:
    if reference.quantization is not None or reference.config != artifact.config:
        raise UserError(f"{options.reference} is not the float32 artifact of {options.artifact}")
    if dataset.tokenizer_sha256 != artifact.tokenizer().sha256:
        raise UserError(f"{options.data} was made with another tokenizer than {options.artifact}")
    if artifact.config.block_size < PROMPT_TOKENS + 2:
        raise UserError(
            f"{options.artifact} has a context of {artifact.config.block_size} tokens, at least "
            f"{PROMPT_TOKENS + 2} are needed"
        )
