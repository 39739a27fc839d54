"""`jaxgpt-export generate`: text from an artifact, streamed.

jaxgpt-export generate --artifact runs/demo/int8-dynamic --prompt "Return the mean of a list."
"""

import dataclasses
import sys
from pathlib import Path

import torch
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.generation import generate
from jaxgpt.shared.sampling import Sampling

from export.artifact import read_artifact
from export.model import Session


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt with an artifact; the text streams to stdout.

    Attributes:
      artifact: the artifact folder.
      prompt: text to continue; an empty one starts a new document.
      max_new_tokens: tokens to generate at most.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest tokens whose probabilities reach p.
      seed: of the random numbers.
      stop: texts that end the generation and are not shown.
      threads: CPU threads; 0 takes PyTorch's choice.
      json: print one JSON document with text and figures on stdout instead of the text.
    """

    artifact: Path
    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    threads: int = 0
    json: bool = False


def set_threads(count: int) -> None:
    """Let PyTorch use so many threads; 0 leaves its choice."""
    if count < 0:
        raise UserError(f"threads ({count}) must be 0 (PyTorch's choice) or more")
    if count:
        torch.set_num_threads(count)


def run(options: GenerateOptions) -> Result:
    """Run `jaxgpt-export generate`."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    set_threads(options.threads)
    artifact = read_artifact(options.artifact)
    tokenizer = artifact.tokenizer()

    def show(text: str) -> None:
        if not options.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    session = Session(artifact.model())
    done = generate(session, tokenizer, options.prompt, options.max_new_tokens, sampling, options.stop, show)
    show("\n")
    rate = (len(done.tokens) - 1) / done.decode_s if len(done.tokens) > 1 else None
    speed = f", {rate:.1f} tokens/s" if rate else ""
    say(f"{artifact.kind}: {len(done.tokens)} tokens ({done.finish_reason}){speed}")
    return Result({"kind": artifact.kind, "tokens_per_s": rate, **dataclasses.asdict(done)})
