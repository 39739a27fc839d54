"""`jaxgpt-export generate`: text from an artifact, streamed; or from a file of prompts, side by side.

jaxgpt-export generate --artifact runs/demo/int8-dynamic --prompt "Return the mean of a list."
jaxgpt-export generate --artifact runs/demo/int8-dynamic --prompts prompts.jsonl --batch 8
jaxgpt-export generate --artifact runs/demo/int8-dynamic --prompt - < prompt.txt
jaxgpt-export generate --artifact runs/demo/int8-dynamic          # on a terminal: asks for prompts
"""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from jaxgpt.generation.generate import DRAFT_TOKENS, SIDE_BY_SIDE, PromptOptions, generate_shown
from jaxgpt.generation.repetition import changes_by_history
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.session import Session
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer

from jaxgpt_export.format.artifact import read_certified_artifact
from jaxgpt_export.format.generation_config import read_generation_config
from jaxgpt_export.generation.open_session import CacheOption, Engine, choose_threads, open_session
from jaxgpt_export.generation.request_file import generate_all, read_prompts
from jaxgpt_export.native.native_session import MOST_SLOTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(PromptOptions):
    """Continue a prompt with an artifact; the text streams to stdout.

    Without --prompt and --prompts, on a terminal, it asks for prompts, again and again.

    Attributes:
      artifact: the artifact folder.
      engine: native (C++), torch (the PyTorch module), or auto: native where it can.
      threads: CPU threads; 0 takes all cores that this process may use.
      kv_cache: what keys and values are kept as; auto: fp16, or fp32 beside float32 weights. The PyTorch
        module rounds them to float16 where its inputs are rounded to 8 bits (so both give the same text),
        else it keeps float32.
      draft_tokens: tokens that the native engine drafts at most (prompt lookup) where the text of --prompt
        repeats itself, 8 unless given; the text is the same without (0).
      prompts: a .jsonl file, each line {"prompt": ...} with its own max_new_tokens and seed if it has them;
        prints one JSON line a prompt, in order.
      batch: prompts of a file that are generated side by side, 8 unless given; the PyTorch module takes one.
    """

    RENAMED: ClassVar[dict[str, str]] = {"--guess": "--draft-tokens"}

    artifact: Path
    engine: Engine = "auto"
    threads: int = 0
    kv_cache: CacheOption = "auto"
    draft_tokens: int | None = None
    prompts: Path | None = None
    batch: int | None = None


def run(options: GenerateOptions) -> Result:
    """Run `jaxgpt-export generate`."""
    # A bad value is said before anything is loaded.
    sampling = options.sampling(read_generation_config(options.artifact))
    _check(options)
    if options.draft_tokens and changes_by_history(sampling):
        raise UserError("--draft-tokens is for text without penalties of repetition; leave it out")
    requests = None if options.prompts is None else read_prompts(options.prompts, options, sampling)
    terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    asks = options.prompt is None and requests is None and not options.json and terminal
    prompt = options.prompt_text()
    threads = choose_threads(options.threads)
    artifact = read_certified_artifact(options.artifact)
    tokenizer = artifact.tokenizer()
    slots = 1 if requests is None else min(options.batch or SIDE_BY_SIDE, len(requests))
    session, name = open_session(artifact, options.engine, threads, options.kv_cache, slots)
    artifact.tensors.clear()  # whatever runs has its own copy
    if requests is not None:
        return generate_all(session, tokenizer, requests, options, sys.stdout, name)
    title = f"{artifact.kind}, {name}"
    if asks:
        return ask(lambda prompt: _one(session, tokenizer, options, prompt, sampling, title), title)
    figures = _one(session, tokenizer, options, prompt, sampling, title)
    return Result({"kind": artifact.kind, "engine": name, **figures})


def _check(options: GenerateOptions) -> None:
    """Raise UserError for options that can't be meant, or would do nothing."""
    if (options.draft_tokens or 0) < 0 or (options.batch is not None and options.batch < 1):
        raise UserError("--draft-tokens must not be negative, --batch must be at least 1")
    if options.prompts is None and options.max_new_tokens < 1:
        raise UserError(f"max_new_tokens ({options.max_new_tokens}) must be at least 1")
    if (options.batch or 0) > MOST_SLOTS:
        raise UserError(f"--batch is {options.batch}, expected at most {MOST_SLOTS}")
    if options.prompts is not None and options.prompt is not None:
        raise UserError("--prompt and --prompts are both given; leave one out")
    if options.prompts is not None and options.draft_tokens:
        raise UserError("--draft-tokens is for --prompt: prompts of a file share their steps, without drafts")
    if options.engine == "torch" and options.draft_tokens:
        raise UserError("--draft-tokens is for the native engine; leave it out, or --engine torch")
    if options.batch is not None and options.prompts is None:
        raise UserError("--batch is of the prompts of a file; give --prompts FILE.jsonl")


def _one(
    session: Session,
    tokenizer: Tokenizer,
    options: GenerateOptions,
    prompt: str,
    sampling: Sampling,
    title: str,
) -> dict[str, Any]:
    """Continue a prompt on stdout and say how it went; return its figures."""
    drafted = DRAFT_TOKENS if options.draft_tokens is None else options.draft_tokens
    done = generate_shown(session, tokenizer, options, prompt, sampling, drafted)
    rate = (len(done.tokens) - 1) / done.decode_s if len(done.tokens) > 1 else None
    speed = f", {rate:.1f} tokens/s" if rate else ""
    ahead = f", {done.accepted} of {done.guessed} draft tokens were accepted" if done.guessed else ""
    say(f"{title}: {len(done.tokens)} tokens ({done.finish_reason}){speed}{ahead}")
    return {"tokens_per_s": rate, **dataclasses.asdict(done)}


def ask(answer: Callable[[str], object], title: str) -> Result:
    """Ask for prompts on a terminal and answer each, until Ctrl-D; Ctrl-C ends a text that is being written.

    Args:
      answer: prints what follows a prompt; UserError for one that is too long, say.
      title: what answers.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # arrow keys and history for input()
    say(f"{title}: each line is a prompt of its own; an empty one begins a text from nothing. Ctrl-D ends")
    count = 0
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return Result({"texts": count})
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            raise SystemExit(130) from None
        except UnicodeDecodeError as error:
            say(f"error: the line is not UTF-8 ({error})")
            continue
        try:
            answer(prompt)
            count += 1
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except UserError as error:
            say(f"error: {error}")
