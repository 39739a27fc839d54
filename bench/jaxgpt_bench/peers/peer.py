"""What a peer is: another program that generates with the same model."""

import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from jaxgpt.generation.session import Session

if TYPE_CHECKING:
    from jaxgpt_export.format.artifact import Artifact as Artifact
else:  # it imports PyTorch, which a peer's process would carry in its peak of memory
    Artifact = Any

# GNU OpenMP's threads spin at a barrier or sleep. Spinning is faster on free cores and collapses when another
# process takes one: llama.cpp at 4 bits made 172 and 1 tokens/s spinning, 62 in that second case asleep.
OPENMP: tuple[dict[str, str], ...] = ({}, {"OMP_WAIT_POLICY": "PASSIVE"})
Floats = npt.NDArray[np.float32]

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


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run one program: each is a row of its own.

    Attributes:
      cached: with a KV cache.
      every_logit: asks for the logits of every position, of which only the last are used, as
        `model(ids).logits[:, -1]` does.
      isa: an instruction set, where a program lets that be chosen; "" takes the best.
    """

    cached: bool = True
    every_logit: bool = False
    isa: str = ""


PLAIN = Variant()


class Program:
    """What can be measured: it opens what lies on the disk and gives a session.

    Attributes:
      engine: its name in the rows.
      environments: variables of its process, beside those that every program gets: each is tried, the
        fastest taken.
      kv_bytes: of a number in its KV cache: 4 for float32, 2 for float16.

    A session may have `generate_greedily(prompt, count)`, which is timed in place of single steps (see
    common/timing.py). No program imports PyTorch, JAX or a peer's library at the head of its file.
    """

    engine: ClassVar[str]
    environments: ClassVar[tuple[dict[str, str], ...]] = ({},)
    kv_bytes: ClassVar[int] = 4

    def kv_bytes_beside(self, precision: str) -> int:
        """Return the bytes of a number in the KV cache, beside weights of a precision."""
        return self.kv_bytes

    def open(self, path: Path, precision: str, threads: int, variant: Variant = PLAIN) -> Session:
        """Load a model.

        Args:
          path: file or folder.
          precision: the row's.
          threads: CPU threads; setting them is up to the program.
          variant: one of those that it has.
        """
        raise NotImplementedError


class Peer(Program):
    """Another program than this project's.

    Attributes:
      modules: Python modules that must be there.
      install: what to give to pip for them.
      precisions: its rows, the float32 one first where there is one.
      variants: ways in which each of them is measured.
    """

    modules: ClassVar[tuple[str, ...]]
    install: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    variants: ClassVar[tuple[Variant, ...]] = (PLAIN,)

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


def fastest(opened: Mapping[Any, Session], folder: Path, name: str) -> dict[str, Any]:
    """Try settings whose order differs between machines, write the fastest into a folder and return it.

    Args:
      opened: a session for each value of the setting.
      folder: where `chosen` finds it.
      name: of the setting.
    """
    times: dict[Any, list[float]] = {value: [] for value in opened}
    for session in opened.values():
        session.prefill([0])
    for _ in range(min(TRIAL_STEPS, *(session.block_size - 1 for session in opened.values()))):
        for value, session in opened.items():
            started = time.perf_counter()
            session.decode(0)
            times[value].append(time.perf_counter() - started)
    # Sums, not medians: what a stolen core costs comes in few, long steps.
    found = {name: min(times, key=lambda value: sum(times[value]))}
    (folder / CHOSEN).write_text(json.dumps(found), encoding="utf-8")
    return found


def chosen(folder: Path, name: str, otherwise: Any) -> Any:
    """Return what `fastest` wrote, or a value where no trial was made."""
    path = folder / CHOSEN
    return json.loads(path.read_text(encoding="utf-8"))[name] if path.exists() else otherwise


def arrays(artifact: Artifact) -> dict[str, Floats]:
    """Return a float32 artifact's tensors by module name, matrices (O, I)."""
    return {name: np.asarray(tensor) for name, tensor in artifact.tensors.items()}


def float_bytes(artifact: Artifact) -> int:
    """Return the bytes of float32 weights that one token reads: all but rows of embeddings."""
    return weight_bytes(artifact, lambda matrix: 4.0 * matrix.size)


def weight_bytes(artifact: Artifact, matrix_bytes: Callable[[Floats], float]) -> int:
    """Return the bytes of weights that one token reads.

    Args:
      artifact: float32.
      matrix_bytes: takes a matrix (O, I) of a linear layer or the head, gives its bytes.
    """
    total = 0.0
    for name, array in arrays(artifact).items():
        if name == "wpe.weight" or (name == "wte.weight" and not artifact.config.tied):
            continue
        total += 4 * array.size if array.ndim == 1 else matrix_bytes(array)
    return round(total)


def head_weight(artifact: Artifact) -> Floats:
    """Return the head's matrix (V, C)."""
    return arrays(artifact)["wte.weight" if artifact.config.tied else "lm_head.weight"]
