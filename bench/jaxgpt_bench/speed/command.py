"""`jaxgpt-bench generate`: tokens a second, beside the ceiling that the memory sets.

    jaxgpt-bench generate --artifact ART... --tokens 250
    jaxgpt-bench generate --preset gpt2 --peers            (random weights: speed does not depend on them)

Every contestant runs in a process of its own, with the same threads and in huge pages; in each round all of
them generate once, one after the other, so that a slow moment of the machine hits none alone; a few tokens
before that are not timed, as memory that lay still for minutes is read slowly at first. The ceiling is
measured read bandwidth / bytes that a token reads: weights, and the keys and values of the text so far (an
average over it), for every program alike. Reading a buffer of just that size is what is measured, right
before and after the contestant in each round. decode_tokens_per_s is the rate after the first token; seconds
are those of all tokens and of the prompt.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError, nearest
from jaxgpt.shared.files import prepare_output_file, write_json
from jaxgpt_bench.speed.options import SpeedOptions

if TYPE_CHECKING:
    from jaxgpt_export.format.artifact import Artifact as Artifact
else:  # it imports PyTorch
    Artifact = Any


def generate(options: SpeedOptions) -> Result:
    """Run `jaxgpt-bench generate`."""
    from jaxgpt_export.generation.open_session import choose_threads

    from jaxgpt_bench.common.tables import CHARACTERS, PREFILL, SAME_TOKENS, SPEED, table
    from jaxgpt_bench.noise.verdict import warn
    from jaxgpt_bench.speed.contestants import chosen_peers
    from jaxgpt_bench.speed.rounds import measure_speed

    check(options)
    prepare_output_file(options.out)
    wanted = chosen_peers(options.peers, options.peer)
    threads = choose_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as scratch:
        artifacts = read_artifacts(options, Path(scratch))
        figures = measure_speed(options, artifacts, wanted, Path(scratch), threads)
    known = [CHARACTERS] if any(row.characters_per_s is not None for row in figures.rows) else []
    stderr.print(table([*SPEED, *known, PREFILL, SAME_TOKENS], figures.rows).terminal())
    warn(figures.noise)
    written = figures.to_json()
    if options.out is not None:
        write_json(options.out, written)
        from jaxgpt_bench.common.plots import write_speed_plots  # matplotlib takes a second

        say(f"wrote {options.out} and {', '.join(map(str, write_speed_plots(figures, options.out)))}")
    return Result(written)


def check(options: SpeedOptions) -> None:
    """Raise UserError for what can't be measured."""
    from jaxgpt_export.native.library import instruction_sets

    from jaxgpt_bench.speed.contestants import chosen_isa

    if options.tokens < 2 or options.rounds < 1 or options.prefill < 1 or options.busy < 0:
        raise UserError(
            "--tokens must be at least 2, --rounds and --prefill at least 1, --busy must not be negative"
        )
    if options.native_only and options.uncached:
        raise UserError("--uncached is a way to run the PyTorch module, which --native-only leaves out")
    wanted = [("--isa", isa) for isa in options.isa]
    if chosen_isa():
        wanted.append(("JAXGPT_ISA", chosen_isa()))
    for source, isa in wanted if instruction_sets() or options.isa else ():
        if isa not in instruction_sets():
            here = ", ".join(instruction_sets()) or "there are none, as the native engine was not built"
            raise UserError(f"{source} {isa!r} is none of this machine's: {here}")


def read_artifacts(options: SpeedOptions, scratch: Path) -> list[Artifact]:
    """Read what is measured, or make it of random weights.

    Raises:
      UserError: there is nothing, or of different models, or the tokens do not fit their context.
    """
    from jaxgpt_export.format.artifact import read_artifact

    folders = list(options.artifact)
    if options.preset is not None:
        if folders or options.run is not None:
            raise UserError("give --preset, or --artifact and --run, not both")
        from jaxgpt_bench.speed.random_models import random_artifacts

        folders = random_artifacts(options.preset, scratch, options.kind)
    artifacts = [read_artifact(folder) for folder in folders]
    known = [artifact.kind for artifact in artifacts]
    for kind in options.kind if known else ():
        if kind not in known:
            raise UserError(f"--kind {kind!r} is none of the artifacts' kinds; {nearest(kind, known)}")
    artifacts = [each for each in artifacts if not options.kind or each.kind in options.kind]
    if not artifacts:
        raise UserError("nothing to measure: give --artifact ART... or --preset NAME")
    for index, kind in enumerate(kinds := [each.kind for each in artifacts]):
        if kind in kinds[:index]:
            first, second = artifacts[kinds.index(kind)].folder, artifacts[index].folder
            raise UserError(
                f"{first} and {second} are both {kind}, which names their rows; measure one after the other"
            )
    config = artifacts[0].config
    if any(artifact.config != config for artifact in artifacts):
        raise UserError("the artifacts are of different models; measure them one after the other")
    if config.block_size - options.tokens + 1 < 1:
        raise UserError(f"--tokens {options.tokens} does not fit the model's context of {config.block_size}")
    return artifacts
