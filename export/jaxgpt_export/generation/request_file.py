"""Many prompts: `jaxgpt-export generate --prompts FILE`, side by side where the session has slots for it."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from jaxgpt.generation.generate import PromptOptions, Request, generate_many
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.session import Session
from jaxgpt.generation.state import Generation, prompt_tokens
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer

FIELDS = {"prompt": str, "max_new_tokens": int, "seed": int}


def read_prompts(path: Path, options: PromptOptions, sampling: Sampling) -> list[Request]:
    """Read a .jsonl file of prompts; options and sampling say what a line does not.

    Raises:
      UserError: the file cannot be read, or a line (named) is none.
    """
    try:
        # A line of JSON ends at \n alone: str.splitlines cuts at characters that may stand in a string too.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"prompts {path} are not UTF-8 ({error}); convert the file first") from None
    except OSError as error:
        raise UserError(f"prompts {path} cannot be read ({error.strerror}); check the path") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is no JSON ({error}); mend it, or leave it out") from None
        if not isinstance(fields, dict) or "prompt" not in fields:
            raise UserError(f'{path} line {number} is no prompt; expected {{"prompt": "..."}}')
        for name, value in fields.items():
            if name not in FIELDS or type(value) is not FIELDS[name]:
                raise UserError(
                    f"{path} line {number} has {name} {value!r}; expected "
                    + ", ".join(f"{field} ({kind.__name__})" for field, kind in FIELDS.items())
                )
        most = fields.get("max_new_tokens", options.max_new_tokens)
        if most < 1:
            raise UserError(f"{path} line {number} has max_new_tokens {most}, expected at least 1")
        if (seed := fields.get("seed", options.seed)) < 0:
            raise UserError(f"{path} line {number} has seed {seed}, expected at least 0")
        drawn = dataclasses.replace(sampling, seed=seed)
        requests.append(Request(fields["prompt"], most, drawn))
    if not requests:
        raise UserError(f"{path} holds no prompts")
    return requests


def generate_all(
    session: Session,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    options: PromptOptions,
    out: IO[str],
    engine: str,
) -> Result:
    """Generate all texts; print each as a JSON line as soon as those before it are done."""
    for number, request in enumerate(requests, 1):  # before any work: a prompt too long ends nothing halfway
        try:
            prompt_tokens(tokenizer, request.prompt, session.block_size)
        except UserError as error:
            raise UserError(f"prompt {number} of {len(requests)}: {error}") from None
    started = time.perf_counter()
    found: dict[int, Generation] = {}
    printed = 0
    for index, done in generate_many(session, tokenizer, requests, options.stop):
        found[index] = done
        while printed in found and not options.json:
            out.write(json.dumps(_line(requests[printed], found[printed])) + "\n")
            out.flush()
            printed += 1
    seconds = time.perf_counter() - started
    count = sum(len(done.tokens) for done in found.values())
    say(f"{engine}: {len(requests)} texts, {count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s")
    results = [_line(request, found[index]) for index, request in enumerate(requests)]
    return Result({"engine": engine, "tokens_per_s": count / seconds, "seconds": seconds, "results": results})


def _line(request: Request, done: Generation) -> dict[str, Any]:
    return {"prompt": request.prompt, **dataclasses.asdict(done)}
