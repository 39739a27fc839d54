"""The engines that `jaxgpt-bench generate` times, each in a process of its own.

    python -m bench.engines '{"engine": "jaxgpt-torch", "precision": "fp32", "folder": "...", "threads": 2}'

is what the bench starts (see workers.py): it loads the model and then generates once for every line.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.workers import serve
from jaxgpt.shared.generation import Engine


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One row of the speed table.

    Attributes:
      engine: jaxgpt-torch, jaxgpt-flax, transformers.
      precision: fp32, int8-dynamic, int8-static.
      folder: the artifact, or the run for jaxgpt-flax.
      threads: CPU threads.
      cached: with a KV cache.
      every_logit: asks for the logits of every position, of which only the last are used, as
        `model(ids).logits[:, -1]` does.
    """

    engine: str
    precision: str
    folder: str
    threads: int
    cached: bool = True
    every_logit: bool = False

    @property
    def name(self) -> str:
        """Name of the row."""
        return row_name(dataclasses.asdict(self))


def row_name(row: Mapping[str, Any]) -> str:
    """Name a row, given what a Contestant holds."""
    how = ("" if row["cached"] else ", no KV cache") + (", every logit" if row["every_logit"] else "")
    return f"{row['engine']} {row['precision']}{how}"


class TransformersEngine:
    """Hugging Face's GPT-2, with its own cache or, as the original project ran it, without."""

    def __init__(self, folder: str, cached: bool, every_logit: bool) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.block_size = int(self._model.config.n_positions)
        self._cached = cached
        self._logits_to_keep = 0 if every_logit else 1  # 0: all; 1 is what generate() asks for
        self._past: Any = None
        self._tokens: list[int] = []

    def start(self, tokens: Any) -> Any:
        """Take a prompt; return the logits (V,) after it."""
        self._past, self._tokens = None, list(tokens)
        return self._run(list(tokens))

    def step(self, token: int) -> Any:
        """Take one more token; return the logits (V,) after it."""
        self._tokens.append(token)
        return self._run([token] if self._cached else self._tokens)

    def _run(self, tokens: list[int]) -> Any:
        with self._torch.inference_mode():
            out = self._model(
                self._torch.tensor([tokens]),
                past_key_values=self._past if self._cached else None,
                use_cache=self._cached,
                logits_to_keep=self._logits_to_keep,
            )
        self._past = out.past_key_values if self._cached else None
        return out.logits[0, -1].numpy()


def open_engine(contestant: Contestant) -> Engine:
    """Load a model."""
    if contestant.engine == "jaxgpt-flax":
        from jaxgpt.checkpoints import load_params
        from jaxgpt.runs import open_run
        from jaxgpt.sample import JaxEngine

        run = open_run(Path(contestant.folder))
        return JaxEngine(run.config.model, load_params(run, "best")[1])
    import torch

    torch.set_num_threads(contestant.threads)
    if contestant.engine == "transformers":
        return TransformersEngine(contestant.folder, contestant.cached, contestant.every_logit)
    from export.artifact import load
    from export.model import Session, UncachedSession

    model = load(contestant.folder)
    return Session(model) if contestant.cached else UncachedSession(model)


def timed_generation(engine: Engine, prompt: list[int], count: int) -> dict[str, Any]:
    """Generate greedily, never stopping early.

    Args:
      engine: the model.
      prompt: tokens.
      count: tokens to generate; prompt and they fit into the context.

    Returns:
      tokens, prefill_s (prompt to first token) and decode_s (the other count - 1 tokens).
    """
    started = time.perf_counter()
    tokens = [int(engine.start(prompt).argmax())]
    first = time.perf_counter()
    while len(tokens) < count:
        tokens.append(int(engine.step(tokens[-1]).argmax()))
    return {"tokens": tokens, "prefill_s": first - started, "decode_s": time.perf_counter() - first}


def prepare(order: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load an engine; return what answers {"prompt": [...], "count": N}."""
    engine = open_engine(Contestant(**order))
    return lambda question: timed_generation(engine, question["prompt"], question["count"])


if __name__ == "__main__":
    serve(prepare)
