"""The project's own programs, as `jaxgpt-bench generate` measures them beside the peers."""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from jaxgpt.generation.session import Session
from jaxgpt_bench.peers import find_peers
from jaxgpt_bench.peers.peer import NO_SETTINGS, OPENMP, PLAIN, Floats, Program, Settings, Variant


class Native(Program):
    """The native engine on an artifact; it keeps keys and values as `jaxgpt-export generate` does."""

    engine: ClassVar[str] = "jaxgpt-native"

    def kv_bytes_beside(self, precision: str) -> int:
        """Return 4 beside float32 weights, else 2."""
        return 4 if precision == "fp32" else 2

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> Session:
        """Read and pack the artifact."""
        from jaxgpt_export.format.artifact import read_artifact
        from jaxgpt_export.generation.open_session import default_cache
        from jaxgpt_export.native.native_model import NativeModel
        from jaxgpt_export.native.native_session import NativeSession

        artifact = read_artifact(path)
        model = NativeModel(artifact, threads, variant.isa or None)
        return NativeSession(model, cache=default_cache(artifact))

    def text_logits(self, session: Any, tokens: Sequence[int]) -> Floats:
        """Return the logits (T, V) after each token, all at once: the same bits as one at a time."""
        session.truncate(0)
        logits: Floats = session.forward(tokens, all_logits=True)
        return logits


class Torch(Program):
    """The PyTorch module of an artifact."""

    engine: ClassVar[str] = "jaxgpt-torch"
    environments: ClassVar[tuple[dict[str, str], ...]] = OPENMP

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> Session:
        """Load the artifact."""
        import torch
        from jaxgpt_export.generation.torch_session import TorchSession, UncachedTorchSession
        from jaxgpt_export.model.build import load

        torch.set_num_threads(threads)
        model = load(path)
        return TorchSession(model) if variant.cached else UncachedTorchSession(model)


class Flax(Program):
    """The Flax model of a run, at its best checkpoint."""

    engine: ClassVar[str] = "jaxgpt-flax"

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> Session:
        """Restore the checkpoint; XLA takes as many threads as there are cores, so it is given so many."""
        if hasattr(os, "sched_setaffinity"):  # Linux
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0), key=_cores_first)[:threads])
        from jaxgpt.training.flax_session import FlaxSession
        from jaxgpt.training.run.checkpoints import load_params
        from jaxgpt.training.run.folder import open_run

        run = open_run(path)
        return FlaxSession(run.config.model, load_params(run, "best")[1])


def _cores_first(cpu: int) -> tuple[int, int]:
    """Order CPUs so that each core comes once before any comes twice."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    siblings = [int(each) for each in re.findall(r"\d+", path.read_text())] if path.exists() else [cpu]
    return (sorted(siblings).index(cpu) if cpu in siblings else 0, cpu)


NATIVE, TORCH, FLAX = Native(), Torch(), Flax()
OWN: tuple[Program, ...] = (NATIVE, TORCH, FLAX)


def own_engines() -> tuple[str, ...]:
    """Return the engine names of this project's programs."""
    return tuple(program.engine for program in OWN)


@functools.cache
def find_programs() -> dict[str, Program]:
    """Return all that can be measured, by engine name: this project's own, then the peers."""
    return {**{program.engine: program for program in OWN}, **find_peers()}
