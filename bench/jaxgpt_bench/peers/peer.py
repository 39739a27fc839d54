"""What a peer is: another program that generates with the same model."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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

Settings = Mapping[str, Any]  # that a program is opened with
NO_SETTINGS: Settings = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the ways to run a program of which each machine has its own fastest.

    Attributes:
      environment: variables of its process, beside those that every program gets.
      settings: that it is opened with.
    """

    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Settings = dataclasses.field(default_factory=dict)

    @property
    def said(self) -> dict[str, Any]:
        """What a row says of it."""
        return {**self.settings, **self.environment}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a peer loads.

    Attributes:
      path: file or folder.
      bytes_per_token: of the weights that one token reads, at the width they have in memory.
      one_of: of a folder with a file for each setting, one of these files; None for all others.
    """

    path: Path
    bytes_per_token: int
    one_of: Path | None = None

    @property
    def file_bytes(self) -> int:
        """Size of the file, or of all files of the folder."""
        path = self.one_of or self.path
        if path.is_file():
            return path.stat().st_size
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


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
      environments: variables of its process, beside those that every program gets, that are tried.
      kv_bytes: of a number in its KV cache: 4 for float32, 2 for float16.
      changes_values: its settings change what is computed, not only how fast.

    A session may have `generate_greedily(prompt, count)`, which is timed in place of single steps (see
    common/timing.py). No program imports PyTorch, JAX or a peer's library at the head of its file.
    """

    engine: ClassVar[str]
    environments: ClassVar[tuple[dict[str, str], ...]] = ({},)
    kv_bytes: ClassVar[int] = 4
    changes_values: ClassVar[bool] = False

    def kv_bytes_beside(self, precision: str) -> int:
        """Return the bytes of a number in the KV cache, beside weights of a precision."""
        return self.kv_bytes

    def settings_tried(self, precision: str) -> tuple[Settings, ...]:
        """Return the settings of `open` that are tried, what it takes without any first."""
        return (NO_SETTINGS,)

    def choices(self, precision: str) -> tuple[Choice, ...]:
        """Return the ways to run it that are tried: for each use the fastest is taken."""
        return tuple(
            Choice(environment, settings)
            for environment in self.environments
            for settings in self.settings_tried(precision)
        )

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> Session:
        """Load a model.

        Args:
          path: file or folder.
          precision: the row's.
          threads: CPU threads; setting them is up to the program.
          variant: one of those that it has.
          settings: of one of its `choices`.
        """
        raise NotImplementedError

    def text_logits(self, session: Session, tokens: Sequence[int]) -> Floats:
        """Return the logits (T, V) after each token of a text.

        Tokens are taken one at a time, as in generation: a program that rounds the inputs of a whole prompt
        with one scale computes something else there. Where it does not, it may take them all at once.

        Args:
          session: that `open` gave.
          tokens: (T,), T > 0.
        """
        first = session.prefill(tokens[:1])
        logits = np.empty((len(tokens), len(first)), np.float32)
        logits[0] = first
        for place, token in enumerate(tokens[1:], start=1):
            logits[place] = session.decode(token)
        return logits


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
