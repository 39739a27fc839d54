"""`jaxgpt-export generate`: text from an artifact, streamed.

jaxgpt-export generate --artifact runs/demo/int8-dynamic --prompt "Return the mean of a list."
"""

import dataclasses
import os
from pathlib import Path

import torch
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.generation import PromptOptions, generate_shown

from export.artifact import read_artifact
from export.model import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(PromptOptions):
    """Continue a prompt with an artifact; the text streams to stdout.

    Attributes:
      artifact: the artifact folder.
      threads: CPU threads; 0 takes PyTorch's choice.
    """

    artifact: Path
    threads: int = 0


def set_threads(count: int) -> None:
    """Let PyTorch use so many threads; 0 leaves its choice."""
    most = len(os.sched_getaffinity(0))
    if not 0 <= count <= most:
        raise UserError(f"threads ({count}) must lie in 0 (PyTorch's choice) to {most}, the cores there are")
    if count:
        torch.set_num_threads(count)


def run(options: GenerateOptions) -> Result:
    """Run `jaxgpt-export generate`."""
    options.sampling()  # a bad value is said before anything is loaded
    set_threads(options.threads)
    artifact = read_artifact(options.artifact)
    done = generate_shown(Session(artifact.model()), artifact.tokenizer(), options)
    rate = (len(done.tokens) - 1) / done.decode_s if len(done.tokens) > 1 else None
    speed = f", {rate:.1f} tokens/s" if rate else ""
    say(f"{artifact.kind}: {len(done.tokens)} tokens ({done.finish_reason}){speed}")
    return Result({"kind": artifact.kind, "tokens_per_s": rate, **dataclasses.asdict(done)})
