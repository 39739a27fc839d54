"""The engines that `jaxgpt-bench generate` times, each in a process of its own.

    python -m jaxgpt_bench.speed.contestant_process '{"engine": "jaxgpt-torch", "precision": "fp32", ...}'

is what the bench starts (see workers.py): it loads the model and then generates once for every line.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxgpt.generation.generate import TOKENS_PER_CALL
from jaxgpt.generation.session import RewindableSession, Session
from jaxgpt_bench.common.workers import serve


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One row of the speed table.

    Attributes:
      engine: jaxgpt-native, jaxgpt-torch, jaxgpt-flax, or a peer's (see `jaxgpt_bench.peers`).
      precision: fp32, int8-dynamic, int8-static, ...
      folder: the artifact, the run for jaxgpt-flax, or what a peer loads.
      threads: CPU threads.
      cached: with a KV cache.
      every_logit: asks for the logits of every position, of which only the last are used, as
        `model(ids).logits[:, -1]` does.
      isa: the native engine's instruction set; "" takes the best.
    """

    engine: str
    precision: str
    folder: str
    threads: int
    cached: bool = True
    every_logit: bool = False
    isa: str = ""

    @property
    def name(self) -> str:
        """Name of the row."""
        return row_name(dataclasses.asdict(self))


def row_name(row: Mapping[str, Any]) -> str:
    """Name a row, given what a Contestant holds."""
    how = ("" if row["cached"] else ", no KV cache") + (", every logit" if row["every_logit"] else "")
    isa = f", {row['isa']}" if row.get("isa") else ""
    return f"{row['engine']} {row['precision']}{how}{isa}"


def open_engine(contestant: Contestant) -> Session:
    """Load a model."""
    if contestant.engine == "jaxgpt-flax":
        from jaxgpt.training.flax_session import FlaxSession
        from jaxgpt.training.run.checkpoints import load_params
        from jaxgpt.training.run.folder import open_run

        run = open_run(Path(contestant.folder))
        return FlaxSession(run.config.model, load_params(run, "best")[1])
    if contestant.engine == "jaxgpt-torch":
        import torch
        from jaxgpt_export.format.artifact import load
        from jaxgpt_export.generation.torch_session import TorchSession, UncachedTorchSession

        torch.set_num_threads(contestant.threads)
        model = load(contestant.folder)
        return TorchSession(model) if contestant.cached else UncachedTorchSession(model)
    if contestant.engine == "jaxgpt-native":
        from jaxgpt_export.format.artifact import read_artifact
        from jaxgpt_export.native.native_model import NativeModel
        from jaxgpt_export.native.native_session import NativeSession

        artifact = read_artifact(Path(contestant.folder))
        return NativeSession(NativeModel(artifact, contestant.threads, contestant.isa or None))
    from jaxgpt_bench.peers import PEERS
    from jaxgpt_bench.peers.transformers_ import Transformers, TransformersSession

    peer, folder = PEERS[contestant.engine], Path(contestant.folder)
    if isinstance(peer, Transformers):
        import torch

        torch.set_num_threads(contestant.threads)
    if contestant.engine == Transformers.engine:
        return TransformersSession(str(folder.parent), contestant.cached, contestant.every_logit)
    return peer.open(folder, contestant.precision, contestant.threads)


@runtime_checkable
class TimesItself(Protocol):
    """An engine whose own loop is timed, because its cache lives only in there."""

    def generate_greedily(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        """Do what timed_generation does."""
        ...


def timed_generation(engine: Session, prompt: list[int], count: int) -> dict[str, Any]:
    """Generate greedily, never stopping early.

    Args:
      engine: the model.
      prompt: tokens.
      count: tokens to generate; prompt and they fit into the context.

    Returns:
      tokens, prefill_s (prompt to first token) and decode_s (the other count - 1 tokens).
    """
    if isinstance(engine, TimesItself):
        return engine.generate_greedily(prompt, count)
    if isinstance(engine, RewindableSession):
        return _timed_greedy(engine, prompt, count)
    started = time.perf_counter()
    tokens = [int(engine.prefill(prompt).argmax())]
    first = time.perf_counter()
    while len(tokens) < count:
        tokens.append(int(engine.decode(tokens[-1]).argmax()))
    return {"tokens": tokens, "prefill_s": first - started, "decode_s": time.perf_counter() - first}


def _timed_greedy(engine: RewindableSession, prompt: list[int], count: int) -> dict[str, Any]:
    """Do the same with an engine that goes on greedily itself, as `generate` lets it; nothing is guessed."""
    started = time.perf_counter()
    engine.truncate(0)
    tokens = [int(engine.greedy(prompt)[0])]
    first = time.perf_counter()
    while len(tokens) < count:
        tokens += engine.decode_greedy(tokens[-1], min(TOKENS_PER_CALL, count - len(tokens)))
    return {"tokens": tokens, "prefill_s": first - started, "decode_s": time.perf_counter() - first}


def prepare(order: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load an engine; return what answers {"prompt": [...], "count": N}."""
    engine = open_engine(Contestant(**order))
    return lambda question: timed_generation(engine, question["prompt"], question["count"])


if __name__ == "__main__":
    serve(prepare)
