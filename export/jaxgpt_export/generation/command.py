"""`jaxgpt-export generate`: text from an artifact, streamed; or from a file of prompts, side by side.

jaxgpt-export generate --artifact runs/demo/int8-dynamic --prompt "Return the mean of a list."
jaxgpt-export generate --artifact runs/demo/int8-dynamic --prompts prompts.jsonl --batch 8
"""

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar, Literal

from jaxgpt.generation.generate import PromptOptions, generate_shown
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError

from jaxgpt_export.format.artifact import read_certified_artifact
from jaxgpt_export.generation.open_session import choose_threads, open_session
from jaxgpt_export.generation.request_file import generate_all, read_prompts
from jaxgpt_export.native.native_session import CacheKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(PromptOptions):
    """Continue a prompt with an artifact; the text streams to stdout.

    Attributes:
      artifact: the artifact folder.
      engine: native (C++, quantized artifacts), torch (the PyTorch module), or auto: native where it can.
      threads: CPU threads; 0 takes all cores that this process may use.
      kv_cache: what keys and values are kept as; the PyTorch module rounds them to float16 where its inputs
        are rounded to 8 bits (so both give the same text), else it keeps float32.
      draft_tokens: tokens that the native engine drafts at most where the text repeats itself (prompt
        lookup); the text is the same without (0).
      prompts: a .jsonl file, each line {"prompt": ...} with its own max_new_tokens and seed if it has them;
        prints one JSON line a prompt, in order.
      batch: prompts of a file that are generated side by side.
    """

    RENAMED: ClassVar[dict[str, str]] = {"--guess": "--draft-tokens"}

    artifact: Path
    engine: Literal["auto", "native", "torch"] = "auto"
    threads: int = 0
    kv_cache: CacheKind = "fp16"
    draft_tokens: int = 8
    prompts: Path | None = None
    batch: int = 8


def run(options: GenerateOptions) -> Result:
    """Run `jaxgpt-export generate`."""
    options.sampling()  # a bad value is said before anything is loaded
    if options.draft_tokens < 0 or options.batch < 1:
        raise UserError("--draft-tokens must not be negative, --batch must be at least 1")
    requests = None if options.prompts is None else read_prompts(options.prompts, options)
    threads = choose_threads(options.threads)
    artifact = read_certified_artifact(options.artifact)
    tokenizer = artifact.tokenizer()
    slots = 1 if requests is None else min(options.batch, len(requests))
    session, name = open_session(artifact, options.engine, threads, options.kv_cache, slots)
    artifact.tensors.clear()  # whatever runs has its own copy
    if requests is not None:
        return generate_all(session, tokenizer, requests, options, sys.stdout, name)
    done = generate_shown(session, tokenizer, options, options.draft_tokens)
    rate = (len(done.tokens) - 1) / done.decode_s if len(done.tokens) > 1 else None
    speed = f", {rate:.1f} tokens/s" if rate else ""
    ahead = f", {done.accepted} of {done.guessed} draft tokens were accepted" if done.guessed else ""
    say(f"{artifact.kind}, {name}: {len(done.tokens)} tokens ({done.finish_reason}){speed}{ahead}")
    figures = {"kind": artifact.kind, "engine": name, "tokens_per_s": rate}
    return Result({**figures, **dataclasses.asdict(done)})
