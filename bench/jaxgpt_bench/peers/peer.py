"""What a peer is: another program that generates with the same model."""

import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxgpt.generation.session import Session

if TYPE_CHECKING:
    from jaxgpt_export.format.artifact import Artifact as Artifact
else:  # it imports PyTorch, which a peer's process would carry in its peak of memory
    Artifact = Any

# GNU OpenMP's threads spin at a barrier or sleep. Spinning is faster on free cores and collapses when another
# process takes one: llama.cpp at 4 bits made 172 and 1 tokens/s spinning, 62 in that second case asleep.
OPENMP: tuple[dict[str, str], ...] = ({}, {"OMP_WAIT_POLICY": "PASSIVE"})
CHOSEN = "chosen.json"
TRIAL_STEPS = 30


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a peer loads.

    Attributes:
      path: file or folder.
      bytes_per_token: of the weights that one token reads, at the width they have in memory.
      settings: that a trial chose on this machine; `open` reads them from the folder.
    """

    path: Path
    bytes_per_token: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def file_bytes(self) -> int:
        """Size of the file, or of all files of the folder."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())


class Peer:
    """Another program.

    Attributes:
      engine: its name in the rows.
      modules: Python modules that must be there.
      install: what to give to pip for them.
      precisions: its rows, the float32 one first where there is one.
      environments: variables of its process, beside those that every engine gets: each is tried, the
        fastest taken.

    Its engines may have `generate_greedily(prompt, count)`, which is timed in place of single steps (see
    `timed_generation` in speed/contestant_process.py). No file here imports PyTorch or a peer's
    library at its head.
    """

    engine: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    install: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    environments: ClassVar[tuple[dict[str, str], ...]] = ({},)

    def missing(self) -> list[str]:
        """Return the modules that are not installed."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]

    def installed(self) -> bool:
        """Whether it can be measured here."""
        return not self.missing()

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Write what it loads.

        Args:
          artifact: float32, with learned positions.
          precision: one of its own.
          scratch: an empty folder.
          threads: that it will run with.
        """
        raise NotImplementedError

    def open(self, path: Path, precision: str, threads: int) -> Session:
        """Load what convert wrote."""
        raise NotImplementedError


def fastest(opened: Mapping[Any, Session], folder: Path, name: str) -> dict[str, Any]:
    """Try settings whose order differs between machines, write the fastest into a folder and return it.

    Args:
      opened: an engine for each value of the setting.
      folder: where `chosen` finds it.
      name: of the setting.
    """
    times: dict[Any, list[float]] = {value: [] for value in opened}
    for engine in opened.values():
        engine.prefill([0])
    for _ in range(min(TRIAL_STEPS, *(engine.block_size - 1 for engine in opened.values()))):
        for value, engine in opened.items():
            started = time.perf_counter()
            engine.decode(0)
            times[value].append(time.perf_counter() - started)
    # Sums, not medians: what a stolen core costs comes in few, long steps.
    found = {name: min(times, key=lambda value: sum(times[value]))}
    (folder / CHOSEN).write_text(json.dumps(found), encoding="utf-8")
    return found


def chosen(folder: Path, name: str, otherwise: Any) -> Any:
    """Return what `fastest` wrote, or a value where no trial was made."""
    path = folder / CHOSEN
    return json.loads(path.read_text(encoding="utf-8"))[name] if path.exists() else otherwise


def float_bytes(artifact: Artifact) -> int:
    """Return the bytes of float32 weights that one token reads: all but rows of embeddings."""
    return weight_bytes(artifact, lambda matrix: 4.0 * matrix.numel())


def weight_bytes(artifact: Artifact, matrix_bytes: Callable[[Any], float]) -> int:
    """Return the bytes of weights that one token reads.

    Args:
      artifact: float32.
      matrix_bytes: takes a matrix (O, I) of a linear layer or the head, gives its bytes.
    """
    total = 0.0
    for name, tensor in artifact.tensors.items():
        if name == "wpe.weight" or (name == "wte.weight" and not artifact.config.tied):
            continue
        total += 4 * tensor.numel() if tensor.ndim == 1 else matrix_bytes(tensor)
    return round(total)


def head_weight(artifact: Artifact) -> Any:
    """Return the head's matrix (V, C)."""
    return artifact.tensors["wte.weight" if artifact.config.tied else "lm_head.weight"]
