"""The programs of `jaxgpt-bench generate` as models of `jaxgpt-bench quality`: the engine and the peers.

Each runs as it runs there, from the same converted files and with the same cache of keys and values, in a
process of its own, and takes the tokens of a window as it takes them when it generates.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxgpt_export.format.artifact import read_certified_artifact

from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt_bench.common.workers import Worker
from jaxgpt_bench.peers.peer import NO_SETTINGS, PLAIN, Settings
from jaxgpt_bench.quality.contestants import ComparedModel
from jaxgpt_bench.speed.contestants import (
    Contestant,
    chosen_peers,
    own_contestants,
    peer_contestants,
    shared_environment,
)
from jaxgpt_bench.speed.programs import NATIVE

THREADS = 1  # of each: no speed is measured, and threads of one step wait for each other on a busy machine


@contextlib.contextmanager
def open_programs(
    folders: Sequence[Path], names: Sequence[str]
) -> Iterator[tuple[list[ComparedModel], dict[str, str]]]:
    """Start the engine on each artifact, and each peer in each of its precisions on the float32 one.

    Args:
      folders: artifacts.
      names: of peers; none: all.

    Yields:
      The models, whose processes live as long as the block; and the rows that are left out, with why.

    Raises:
      UserError: no peer has that name.
    """
    wanted = chosen_peers(True, names)
    artifacts = [read_certified_artifact(folder) for folder in folders]
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxgpt-bench-")))
        contestants = [
            contestant
            for contestant in own_contestants(artifacts, None, False, THREADS)
            if contestant.program is NATIVE
        ]
        peers, left_out = peer_contestants(artifacts, wanted, scratch, THREADS)
        contestants += [peer for peer in peers if peer.variant == PLAIN]
        models: list[ComparedModel] = []
        for contestant, settings in _with_settings(contestants):
            name = ", ".join([contestant.name, *(f"{key} {value}" for key, value in settings.items())])
            try:
                program = stack.enter_context(_started(contestant, settings, scratch / "logits.npy"))
            except RuntimeError as error:
                left_out[name] = str(error)
                say(f"{name} is left out: {error}")
                continue
            size_mb = contestant.file_bytes / 1e6
            if name in [model.name for model in models]:  # float32 weights of another training
                name += f" ({contestant.path.name})"
            engine = contestant.program.engine
            models.append(
                ComparedModel(
                    name, program.forward, None, size_mb, settings=dict(settings) or None, engine=engine
                )
            )
        yield models, left_out


def _with_settings(contestants: Sequence[Contestant]) -> Iterator[tuple[Contestant, Settings]]:
    """Yield each with every setting that changes what it computes; such a setting is not chosen by speed."""
    for contestant in contestants:
        program = contestant.program
        tried = program.settings_tried(contestant.precision) if program.changes_values else (NO_SETTINGS,)
        for settings in tried:
            yield contestant, settings


@contextlib.contextmanager
def _started(contestant: Contestant, settings: Settings, exchanged: Path) -> "Iterator[RunningProgram]":
    environment = shared_environment(contestant.threads)
    order = contestant.order(settings)
    worker = Worker(contestant.name, "jaxgpt_bench.quality.program_process", order, environment)
    program = RunningProgram(worker, exchanged)
    try:
        program.logits([[0, 0]])  # what crashes at its first tokens is left out, not the others with it
        yield program
    finally:
        worker.close()


class RunningProgram:
    """A program in its process.

    Args:
      worker: the process.
      exchanged: file through which logits come.
    """

    def __init__(self, worker: Worker, exchanged: Path) -> None:
        self._worker, self._exchanged = worker, exchanged

    def logits(self, texts: list[list[int]]) -> np.ndarray:
        """Return the logits (B, T, V) of texts of one length.

        Raises:
          RuntimeError: the process stopped.
        """
        self._worker.ask({"texts": texts, "out": str(self._exchanged)})
        found: np.ndarray = np.load(self._exchanged, allow_pickle=False)
        return found

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, T, V) of tokens (B, T).

        Raises:
          UserError: the process stopped.
        """
        try:
            return torch.from_numpy(self.logits(tokens.tolist()))
        except RuntimeError as error:
            raise UserError(str(error)) from None
