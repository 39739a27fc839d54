"""Who takes part in `jaxgpt-bench generate`: this project's programs and the peers, made ready to load."""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.shared.architecture import matrices
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt_bench.common.rows import speed_name
from jaxgpt_bench.common.workers import HUGE_PAGES, Worker
from jaxgpt_bench.peers import find_peers
from jaxgpt_bench.peers.peer import NO_SETTINGS, PLAIN, Peer, Program, Settings, Variant
from jaxgpt_bench.speed.programs import FLAX, NATIVE, TORCH

if TYPE_CHECKING:
    from jaxgpt_export.format.artifact import Artifact as Artifact
else:  # it imports PyTorch
    Artifact = Any

SHAPE = (
    "vocab_size",
    "block_size",
    "n_layer",
    "n_head",
    "n_embd",
    "positions",
    "tied",
)  # of a run and an artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """A program with a model, in one way to run it: a row of the speed table.

    Attributes:
      program: that is measured.
      precision: fp32, int8-dynamic, int8-static, ...
      path: that it opens.
      threads: CPU threads.
      variant: in what way.
      bytes_per_token: that a token reads: weights as they lie in memory, and what `with_cache` adds.
      file_bytes: of what is loaded.
    """

    program: Program
    precision: str
    path: Path
    threads: int
    variant: Variant = PLAIN
    bytes_per_token: int
    file_bytes: int

    @property
    def name(self) -> str:
        """Name of the row."""
        return speed_name(self.program.engine, self.precision, **dataclasses.asdict(self.variant))

    @property
    def is_peer(self) -> bool:
        """Whether it is another program than this project's."""
        return isinstance(self.program, Peer)

    def order(self, settings: Settings = NO_SETTINGS) -> dict[str, Any]:
        """Return what its process is told, as JSON; the settings are those of `Program.open`."""
        return {
            "engine": self.program.engine,
            "precision": self.precision,
            "path": str(self.path),
            "threads": self.threads,
            "variant": dataclasses.asdict(self.variant),
            "settings": dict(settings),
        }


def own_contestants(
    artifacts: Sequence[Artifact],
    run: Path | None,
    uncached: bool,
    threads: int,
    isas: Iterable[str] = (),
    module: bool = True,
) -> list[Contestant]:
    """List this project's: the native engine and the module for each artifact, the Flax model of a run.

    Args:
      artifacts: that are measured.
      run: of the Flax model, or None.
      uncached: the module without a KV cache too.
      threads: CPU threads.
      isas: instruction sets with which the native engine runs too.
      module: the module at all.
    """
    from jaxgpt_export.native.native_model import unsupported_reason

    found = []
    engine_isas = dict.fromkeys((chosen_isa(), *isas))
    for artifact in artifacts:

        def contestant(
            program: Program, size: int, variant: Variant, artifact: Artifact = artifact
        ) -> Contestant:
            return Contestant(
                program=program,
                precision=artifact.kind,
                path=artifact.folder,
                threads=threads,
                variant=variant,
                bytes_per_token=size,
                file_bytes=artifact.file_bytes,
            )

        if unsupported_reason(artifact) is None:
            stored = stored_bytes(artifact)
            found += [contestant(NATIVE, stored, Variant(isa=isa)) for isa in engine_isas]
        variants = [PLAIN, *([Variant(cached=False)] if uncached else [])] if module else []
        found += [contestant(TORCH, weight_bytes(artifact), variant) for variant in variants]
    if run is not None:
        _require_same_shape(run, artifacts[0])
        floats = [artifact for artifact in artifacts if artifact.quantization is None] or artifacts[:1]
        found.append(
            Contestant(
                program=FLAX,
                precision="fp32",
                path=run,
                threads=threads,
                bytes_per_token=weight_bytes(floats[0]),
                file_bytes=floats[0].file_bytes,
            )
        )
    return found


def _require_same_shape(run: Path, artifact: Artifact) -> None:
    from jaxgpt.training.run.folder import open_run

    model = open_run(run).config.model
    if any(getattr(model, name) != getattr(artifact.config, name) for name in SHAPE):
        raise UserError(f"--run {run} has another shape than {artifact.folder}; give the run that it is of")


def not_in_engine(artifacts: Sequence[Artifact]) -> dict[str, str]:
    """Return why the native engine runs none of these artifacts, or not all, by the rows that are missing."""
    from jaxgpt_export.native.native_model import unsupported_reason

    found = {f"{NATIVE.engine} {each.kind}": unsupported_reason(each) for each in artifacts}
    missing = {name: reason for name, reason in found.items() if reason is not None}
    for name, reason in missing.items():
        say(f"{name} is left out: {reason}")
    return missing


def chosen_isa() -> str:
    """Return the instruction set that JAXGPT_ISA chooses for the engine; "" where it takes the best."""
    return os.environ.get("JAXGPT_ISA", "")


def chosen_peers(every: bool, names: Sequence[str]) -> list[str]:
    """Return the peers that are asked for; UserError for a name that none has."""
    peers = find_peers()
    for name in names:
        if name not in peers:
            near = difflib.get_close_matches(name, peers, n=1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise UserError(f"--peer {name!r} is none of {', '.join(peers)}{hint}")
    return list(names) if names else list(peers) if every else []


def peer_contestants(
    artifacts: Sequence[Artifact], names: Sequence[str], scratch: Path, threads: int
) -> tuple[list[Contestant], dict[str, str]]:
    """Convert the float32 artifact for each peer that is installed.

    Returns:
      What is to be measured, and the peers (or rows) that are left out, with why, each said in a line.
    """
    floats = [a for a in artifacts if a.quantization is None and a.config.positions == "learned"]
    found: list[Contestant] = []
    left_out: dict[str, str] = {}
    for name in names:
        peer = find_peers()[name]
        if not floats:
            left_out[name] = "there is no float32 artifact with learned positions, which is what peers take"
        elif not peer.installed():
            left_out[name] = f"{', '.join(peer.missing())} not installed (pip install {peer.install})"
        else:
            converted, failed = _converted(peer, floats[0], scratch, threads)
            found += converted
            left_out |= failed
    for name, reason in left_out.items():
        say(f"{name} is left out: {reason}")
    return found, left_out


def _converted(
    peer: Peer, artifact: Artifact, scratch: Path, threads: int
) -> tuple[list[Contestant], dict[str, str]]:
    found: list[Contestant] = []
    failed: dict[str, str] = {}
    order = {"engine": peer.engine, "artifact": str(artifact.folder)}
    worker: Worker | None = None
    try:
        for precision in peer.precisions:
            say(f"converting for {peer.engine} {precision}")
            folder = scratch / "peers" / peer.engine / precision
            folder.mkdir(parents=True)
            question = {"precision": precision, "scratch": str(folder), "threads": threads}
            try:
                if worker is None:
                    module = "jaxgpt_bench.peers.conversion"
                    worker = Worker(peer.engine, module, order, shared_environment(threads))
                answer = worker.ask(question)
            except RuntimeError as error:  # it crashed; the next one gets a new process
                answer, worker = {"error": str(error)}, None
            if "error" in answer:
                failed[f"{peer.engine} {precision}"] = answer["error"]
                continue
            found += [
                Contestant(
                    program=peer,
                    precision=precision,
                    path=Path(answer["path"]),
                    threads=threads,
                    variant=variant,
                    bytes_per_token=answer["bytes_per_token"],
                    file_bytes=answer["file_bytes"],
                )
                for variant in peer.variants
            ]
    finally:
        if worker is not None:
            worker.close()
    return found, failed


def shared_environment(threads: int) -> dict[str, str]:
    """Return the variables that every process gets."""
    return {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", **HUGE_PAGES}


def in_order(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Put rows of one precision together, in the order in which precisions first appear."""
    order = list(dict.fromkeys(contestant.precision for contestant in contestants))
    return sorted(contestants, key=lambda contestant: order.index(contestant.precision))


def with_cache(contestant: Contestant, config: ModelConfig, positions: float) -> Contestant:
    """Add the keys and values that a token reads to a row's bytes: one rule for every program.

    Args:
      contestant: whose bytes are those of its weights.
      config: of the model.
      positions: that an average token attends to.
    """
    if not contestant.variant.cached:
        return contestant
    size = contestant.program.kv_bytes_beside(contestant.precision)
    read = round(config.n_layer * 2 * config.n_embd * size * positions)
    return dataclasses.replace(contestant, bytes_per_token=contestant.bytes_per_token + read)


def stored_bytes(artifact: Artifact) -> int:
    """Return the bytes of an artifact that one token reads, at the width they are stored with."""
    skipped = ("wpe.", "wte.smooth") if artifact.config.tied else ("wpe.", "wte.")
    return sum(t.nbytes for name, t in artifact.tensors.items() if not name.startswith(skipped))


def weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of weights that one token reads: everything but the embedding rows it skips.

    The token embedding counts once, as the head, where it is that. The PyTorch module holds the weights of
    weight-only artifacts in float32, and those of 4 bits with rounded inputs as two matrices of 8.
    """
    skipped = {"wpe"} if artifact.config.tied else {"wpe", "wte"}
    layers = matrices(artifact.config)
    weight_only = artifact.quantization is not None and not artifact.quantization.rounds_inputs
    total = 0
    for name, tensor in artifact.tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in skipped or name == "wte.smooth":
            continue
        if weight_only and layer in layers and part.startswith("weight"):
            total += 4 * math.prod(layers[layer].shape) if part != "weight_scale" else 0
        elif not weight_only and part == "weight_packed":
            total += 2 * math.prod(layers[layer].shape)
        elif weight_only or part != "group_factor":  # it is multiplied into the two matrices
            total += tensor.nbytes
    return total
