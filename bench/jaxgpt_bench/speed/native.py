"""`jaxgpt-bench native`: what the native engine does beyond plain steps, on a trained model.

    jaxgpt-bench native --artifact runs/tiny-int8 --reference runs/tiny-fp32 --data data/stdlib

One process, one model, rounds interleaved: greedy steps that read the whole head, and with its screen; with
tokens guessed ahead; several texts side by side; and the original project's way, transformers in float32
without KV cache, every logit. Also how soon the first token comes and what memory that takes (in a fresh
process), and how far its logits are from the PyTorch module's, with float32 keys and values and with the
cache's own.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from jaxgpt_export.format.artifact import Artifact, read_artifact
from jaxgpt_export.generation.open_session import set_threads
from jaxgpt_export.generation.torch_session import TorchSession
from jaxgpt_export.native.native_model import NativeModel
from jaxgpt_export.native.native_session import CacheKind, NativeSession

from jaxgpt.generation.generate import TOKENS_PER_CALL, generate
from jaxgpt.generation.sampling import Sampling
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt_bench.common.bandwidth import read_bandwidth
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.common.workers import spread
from jaxgpt_bench.peers.transformers_ import TransformersSession
from jaxgpt_bench.speed.contestant_process import timed_generation

PROMPT_TOKENS = 48
PARITY_TOKENS = 256
GREEDY = Sampling(temperature=0.0)


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
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path
    reference: Path
    data: Path
    prompts: int = 4
    tokens: int = 250
    batch: int = 8
    draft_tokens: int = 8

    RENAMED: ClassVar[dict[str, str]] = {"--guess": "--draft-tokens"}
    rounds: int = 5
    threads: int = 0
    out: Path | None = None
    json: bool = False


def native(options: NativeOptions) -> Result:
    """Run `jaxgpt-bench native`."""
    if min(options.prompts, options.batch, options.draft_tokens, options.rounds) < 1 or options.tokens < 2:
        raise UserError(
            "--prompts, --batch, --draft-tokens and --rounds must be at least 1, --tokens at least 2"
        )
    threads = set_threads(options.threads)
    dataset = open_dataset(options.data)
    artifact, reference = read_artifact(options.artifact), read_artifact(options.reference)
    if reference.quantization is not None or reference.config != artifact.config:
        raise UserError(f"{options.reference} is not the float32 artifact of {options.artifact}")
    tokenizer = artifact.tokenizer()
    count = min(options.tokens, artifact.config.block_size - PROMPT_TOKENS)
    starts = np.linspace(0, len(dataset.val) - PARITY_TOKENS - 1, options.prompts + 1).astype(int)
    prompts = [dataset.val[at : at + PROMPT_TOKENS].tolist() for at in starts[:-1]]
    text = dataset.val[: min(PARITY_TOKENS, artifact.config.block_size)].astype(np.int64)
    model = NativeModel(artifact, threads)
    figures = {
        **provenance(),
        "settings": {
            "artifact": artifact.kind,
            "model": dataclasses.asdict(artifact.config),
            "prompts": options.prompts,
            "prompt_tokens": PROMPT_TOKENS,
            "tokens": count,
            "threads": threads,
            "isa": model.isa,
        },
        "load": load_figures(options.artifact, threads),
        "parity": parity_figures(model, artifact, reference, text),
        **speed_figures(model, reference, tokenizer, prompts, count, options, threads),
    }
    for name in ("load", "parity", "screen", "guess", "batch", "original_way"):
        say(f"{name}: {json.dumps(figures[name])}")
    if options.out is not None:
        write_json(options.out, figures)
    return Result(figures)


def parity_figures(
    model: NativeModel, artifact: Artifact, reference: Artifact, text: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Compare the logits of one text: engine, module, the module in single steps, float32 weights.

    Where inputs are rounded to 8 bits, engine and module compute the same bits from keys and values of the
    same precision; so the module is asked both with those of float32 and with the cache's own.
    """
    module, whole = artifact.model(), torch.from_numpy(text)[None]
    with torch.inference_mode():
        exact = reference.model()(whole)[0].numpy()
        ours = module(whole)[0].numpy()
        halves = module(whole, module.new_cache(rounded_to=torch.float16))[0].numpy()
    session = TorchSession(module)
    half = len(text) // 2
    steps = [session.prefill(text[:half].tolist())] + [session.decode(int(token)) for token in text[half:]]
    error = float(np.abs(ours - exact).max())
    found: dict[str, Any] = {
        "quantization_error_max": error,
        "module_from_itself_in_steps_max": float(np.abs(np.stack(steps) - ours[half - 1 :]).max()),
    }
    alike: dict[CacheKind, npt.NDArray[np.float32] | None] = {"fp32": ours, "fp16": halves, "int8": None}
    for cache, same in alike.items():  # the module has no cache of int8
        native_logits = NativeSession(model, cache=cache).forward(text.tolist(), all_logits=True)
        difference = np.abs(native_logits - ours)
        differ = native_logits.argmax(1) != ours.argmax(1)
        ordered = np.sort(ours, axis=1)
        margin = ordered[:, -1] - ordered[:, -2]
        found[cache] = {
            "max": float(difference.max()),
            "share_of_quantization_error": float(difference.max()) / error,
            "median_position_share": float(np.median(difference.max(axis=1))) / error,
            "largest_token_differs": int(differ.sum()),
            "of_these_with_a_margin_above_the_difference": int((margin[differ] > difference.max()).sum()),
        }
        if same is not None:
            furthest = float(np.abs(native_logits - same).max())
            found[cache]["module_with_this_cache"] = {
                "max": furthest,
                "share_of_quantization_error": furthest / error,
                "share_of_logits_with_the_same_bits": float((native_logits == same).mean()),
            }
    return found


def speed_figures(
    model: NativeModel,
    reference: Artifact,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    count: int,
    options: NativeOptions,
    threads: int,
) -> dict[str, Any]:
    """Time the ways to generate, in turns."""
    plain, screened = NativeSession(model), NativeSession(model)
    many = NativeSession(model, slots=options.batch)
    plain.use_screen(False)
    many.use_screen(False)
    original = TransformersSession(str(reference.folder), cached=False, every_logit=True)
    ways = ("plain", "screen", "guess", "batch", "original_way")
    rates: dict[str, list[float]] = {name: [] for name in ways}
    bandwidths: list[float] = []
    same = {"screen": True, "guess": True, "batch": True}
    exact = guessed = accepted = 0
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    for _ in range(options.rounds):
        taken = timed_generation(original, prompts[0], count)["decode_s"]
        rates["original_way"].append((count - 1) / taken)
        bandwidths.append(read_bandwidth(model.bytes_per_token, threads))
        seconds = dict.fromkeys(("plain", "screen", "guess"), 0.0)
        made = 0
        for prompt, string in zip(prompts, texts, strict=True):
            expected, taken = timed_greedy(plain, prompt, count)
            seconds["plain"] += taken
            screened.use_screen(True)  # also where it was given up for the text before
            before = screened.exact_outputs
            found, taken = timed_greedy(screened, prompt, count)
            seconds["screen"] += taken
            exact += screened.exact_outputs - before
            same["screen"] &= found == expected
            without = generate(screened, tokenizer, string, count, GREEDY)
            done = generate(screened, tokenizer, string, count, GREEDY, draft_tokens=options.draft_tokens)
            same["guess"] &= done.tokens == without.tokens
            seconds["guess"] += done.decode_s / max(len(done.tokens) - 1, 1) * (count - 1)
            guessed, accepted = guessed + done.guessed, accepted + done.accepted
            made += count - 1
        for name, taken in seconds.items():
            rates[name].append(made / taken)
        expected, _ = timed_greedy(plain, prompts[0], count)
        columns, taken = timed_batch(many, prompts[0], count, options.batch)
        same["batch"] &= all(column == expected for column in columns)
        rates["batch"].append(options.batch * (count - 1) / taken)

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[name], rates[base], strict=True))

    return {
        "rounds": options.rounds,
        "bandwidth_gb_s": bandwidths,
        "bytes_per_token": model.bytes_per_token,
        "tokens_per_s": {name: spread(values) for name, values in rates.items()},
        "screen": {
            "used": exact > 0,
            "times_plain": ratio("screen", "plain"),
            "same_tokens": same["screen"],
            "exact_outputs_per_step": exact / (options.rounds * len(prompts) * count),
        },
        "guess": {
            "times_plain": ratio("guess", "plain"),
            "times_screened": ratio("guess", "screen"),
            "same_tokens": same["guess"],
            "guessed": guessed,
            "accepted": accepted,
        },
        "batch": {
            "texts": options.batch,
            "times_plain": ratio("batch", "plain"),
            "same_tokens": same["batch"],
        },
        "original_way": {f"{name}_times_it": ratio(name, "original_way") for name in ways[:3]},
    }


def timed_greedy(session: NativeSession, prompt: list[int], count: int) -> tuple[list[int], float]:
    """Generate greedily; return the tokens and the seconds of all but the first."""
    session.truncate(0)
    tokens = [int(session.greedy(prompt)[0])]
    started = time.perf_counter()
    while len(tokens) < count:
        tokens += session.decode_greedy(tokens[-1], min(TOKENS_PER_CALL, count - len(tokens)))
    return tokens, time.perf_counter() - started


def timed_batch(
    session: NativeSession, prompt: list[int], count: int, texts: int
) -> tuple[list[list[int]], float]:
    """Generate the same text in every slot; return all, and the seconds of all but the first tokens."""
    for slot in range(texts):
        session.truncate(0, slot)
    slots = list(range(texts))
    rows = [session.greedy(prompt * texts, [slot for slot in slots for _ in prompt])]
    started = time.perf_counter()
    while len(rows) < count:
        rows.append(session.greedy(rows[-1].tolist(), slots))
    return np.stack(rows, axis=1).tolist(), time.perf_counter() - started


LOAD = """
import json, sys, time
from pathlib import Path
import numpy, torch, tiktoken
import jaxgpt_export.generation.command as generate
from jaxgpt_bench.common.workers import peak_rss_bytes
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
before, started = resident(), time.perf_counter()
artifact = generate.read_whole_artifact(Path(sys.argv[1]))
tokenizer = artifact.tokenizer()
session, name = generate.open_session(artifact, "native", int(sys.argv[2]))
artifact.tensors.clear()
token = int(session.greedy([tokenizer.endoftext])[0])
seconds, first = time.perf_counter() - started, resident() - before
for _ in range(min(250, session.block_size - 1)):
    token = int(session.greedy([token])[0])
grown, peak = resident() - before, peak_rss_bytes() - before
print(json.dumps({"seconds": seconds, "first": first, "grown": grown, "peak": peak}))
"""


def load_figures(folder: Path, threads: int) -> dict[str, Any]:
    """Load an artifact in a fresh process: seconds to the first token, memory then and later."""
    command = [sys.executable, "-P", "-c", LOAD, str(folder), str(threads)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    size = (folder / "model.safetensors").stat().st_size
    memory = {name: statistics.median(run[name] for run in runs) for name in ("first", "grown", "peak")}
    return {
        "seconds_to_first_token": spread([run["seconds"] for run in runs]),
        "artifact_mb": size / 1e6,
        **{f"{name}_mb": grown / 1e6 for name, grown in memory.items()},
        **{f"{name}_times_artifact": grown / size for name, grown in memory.items()},
    }
