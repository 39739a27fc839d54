"""`jaxgpt-export generate`: text from an artifact, streamed; or from a file of prompts, side by side.

jaxgpt-export generate --artifact runs/demo/int8-dynamic --prompt "Return the mean of a list."
jaxgpt-export generate --artifact runs/demo/int8-dynamic --prompts prompts.jsonl --batch 8
"""

import dataclasses
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.generation import Engine, PromptOptions, generate_shown

from export.artifact import Artifact, read_artifact
from export.batch import generate_all, read_prompts
from export.certificate import altered_files, read_certificate
from export.engine import CacheKind, NativeModel, NativeSession, usable_cores, why_not
from export.model import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(PromptOptions):
    """Continue a prompt with an artifact; the text streams to stdout.

    Attributes:
      artifact: the artifact folder.
      engine: native (C++, quantized artifacts), torch (the PyTorch module), or auto: native where it can.
      threads: CPU threads; 0 takes all cores that this process may use.
      kv_cache: what keys and values are kept as; the PyTorch module rounds them to float16 where its inputs
        are rounded to 8 bits (so both give the same text), else it keeps float32.
      guess: tokens that the native engine tries ahead at most where the text repeats itself; the text is the
        same without (0).
      prompts: a .jsonl file, each line {"prompt": ...} with its own max_new_tokens and seed if it has them;
        prints one JSON line a prompt, in order.
      batch: prompts of a file that are generated side by side.
    """

    artifact: Path
    engine: Literal["auto", "native", "torch"] = "auto"
    threads: int = 0
    kv_cache: CacheKind = "fp16"
    guess: int = 8
    prompts: Path | None = None
    batch: int = 8


def set_threads(count: int) -> int:
    """Let PyTorch use so many threads, 0 for all cores that this process may use; return their number."""
    most = usable_cores()
    if not 0 <= count <= most:
        raise UserError(
            f"threads ({count}) must lie in 0 (all) to {most}, the cores that this process may use"
        )
    torch.set_num_threads(count or most)
    return count or most


def read_whole_artifact(folder: Path) -> Artifact:
    """Read an artifact, and refuse one whose files are not those that its certificate names.

    Raises:
      UserError: see read_artifact; or a file was altered.
    """
    with ThreadPoolExecutor(1) as aside:  # hashing takes as long as all the rest, on another core
        hashed = aside.submit(_altered, folder)
        artifact = read_artifact(folder)
        altered = hashed.result()
    if altered:
        raise UserError(
            f"{folder}: {', '.join(altered)} changed since certificate.json was written; "
            "restore it, or convert or quantize again"
        )
    return artifact


def _altered(folder: Path) -> list[str]:
    if not os.path.lexists(folder / "certificate.json"):  # a link to nowhere is a certificate that is lost
        return []
    return altered_files(folder, read_certificate(folder))


def open_session(
    artifact: Artifact, engine: str, threads: int, cache: CacheKind = "fp16", slots: int = 1
) -> tuple[Engine, str]:
    """Return a session of an artifact and the name of its engine.

    Args:
      artifact: that was read.
      engine: "native", "torch", or "auto": native where it can, else the module, which is said.
      threads: of the native engine; the module takes PyTorch's.
      cache: what the native engine keeps keys and values as; an exact module rounds them to float16 too.
      slots: texts side by side; the native engine only.

    Raises:
      UserError: "native" was asked for and cannot be.
    """
    reason = why_not(artifact) if engine == "auto" else None
    if engine == "torch" or reason is not None:
        if reason is not None and artifact.quantization is not None:
            say(f"the PyTorch module runs, which is slower; not the native engine, because {reason}")
        module = artifact.model()
        as_native = module.exact and cache == "fp16"  # then both give the same text
        return Session(module, torch.float16 if as_native else torch.float32), "jaxgpt-torch"
    model = NativeModel(artifact, threads)
    return NativeSession(model, slots, cache), f"jaxgpt-native ({model.isa})"


def run(options: GenerateOptions) -> Result:
    """Run `jaxgpt-export generate`."""
    options.sampling()  # a bad value is said before anything is loaded
    if options.guess < 0 or options.batch < 1:
        raise UserError("--guess must not be negative, --batch must be at least 1")
    orders = None if options.prompts is None else read_prompts(options.prompts, options)
    threads = set_threads(options.threads)
    artifact = read_whole_artifact(options.artifact)
    tokenizer = artifact.tokenizer()
    slots = 1 if orders is None else min(options.batch, len(orders))
    session, name = open_session(artifact, options.engine, threads, options.kv_cache, slots)
    artifact.tensors.clear()  # whatever runs has its own copy
    if orders is not None:
        return generate_all(session, tokenizer, orders, options, sys.stdout, name)
    done = generate_shown(session, tokenizer, options, options.guess)
    rate = (len(done.tokens) - 1) / done.decode_s if len(done.tokens) > 1 else None
    speed = f", {rate:.1f} tokens/s" if rate else ""
    ahead = f", {done.accepted} of {done.guessed} guessed tokens stood" if done.guessed else ""
    say(f"{artifact.kind}, {name}: {len(done.tokens)} tokens ({done.finish_reason}){speed}{ahead}")
    figures = {"kind": artifact.kind, "engine": name, "tokens_per_s": rate}
    return Result({**figures, **dataclasses.asdict(done)})
