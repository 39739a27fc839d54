"""Who takes part in `jaxgpt-bench generate`: this project's engines and the peers, made ready to load."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.model.gpt import layer_shapes
from jaxgpt_export.native.native_model import unsupported_reason

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt_bench.common.workers import Worker
from jaxgpt_bench.peers import PEERS
from jaxgpt_bench.peers.peer import OPENMP, Peer
from jaxgpt_bench.speed.contestant_process import Contestant

# glibc's malloc then asks for huge pages (madvise): reading is faster in them. Every engine gets them.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
TRIALS = 3
CLEAR = 2.0  # times as slow: not tried again
# Engines that keep keys and values in float16; the others keep them in float32.
FLOAT16_CACHES = ("jaxgpt-native", "llama.cpp")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row to be measured.

    Attributes:
      contestant: what its process opens.
      bytes_per_token: that a token reads: weights as they lie in memory, and what `with_cache` adds.
      file_bytes: of what is loaded.
      environments: variables of its process, beside those that all get; the fastest of them is taken.
      settings: that a peer chose on this machine.
    """

    contestant: Contestant
    bytes_per_token: int
    file_bytes: int
    environments: tuple[dict[str, str], ...] = OPENMP
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the row."""
        return self.contestant.name

    @property
    def precision(self) -> str:
        """The row's precision."""
        return self.contestant.precision

    @property
    def is_peer(self) -> bool:
        """Whether it is another program."""
        return self.contestant.engine in PEERS

    def start(self, prompt: Sequence[int], count: int) -> tuple[Worker, dict[str, str]]:
        """Start its process, in the environment in which it is fastest, and let it generate a little.

        Args:
          prompt: tokens.
          count: tokens to generate, for warming up and then in each of up to TRIALS trials.

        Returns:
          The process, warm, and the variables that were chosen.
        """
        shared = shared_environment(self.contestant.threads)
        order = dataclasses.asdict(self.contestant)
        question = {"prompt": prompt, "count": count}
        workers: list[Worker] = []
        try:
            for environment in self.environments:
                workers.append(
                    Worker(
                        self.name, "jaxgpt_bench.speed.contestant_process", order, {**shared, **environment}
                    )
                )
                workers[-1].ask(question)
            times = [worker.ask(question)["decode_s"] for worker in workers]
            for _ in range(TRIALS - 1 if max(times) < CLEAR * min(times) else 0):
                for index, worker in enumerate(workers):
                    times[index] += worker.ask(question)["decode_s"]
        except BaseException:
            for worker in workers:
                worker.close()
            raise
        best = times.index(min(times))
        for worker in workers[:best] + workers[best + 1 :]:
            worker.close()
        return workers[best], self.environments[best]


def own_entries(
    artifacts: Sequence[Artifact], run: Path | None, uncached: bool, threads: int, isas: Iterable[str] = ()
) -> list[Entry]:
    """List this project's engines: the native one and the module for each artifact, the Flax model of a run.

    Args:
      artifacts: that are measured.
      run: of the Flax model, or None.
      uncached: the module without a KV cache too.
      threads: CPU threads.
      isas: instruction sets with which the native engine runs too.
    """
    found = []
    for artifact in artifacts:
        if unsupported_reason(artifact) is None:
            for isa in ("", *isas):
                contestant = Contestant(
                    "jaxgpt-native", artifact.kind, str(artifact.folder), threads, isa=isa
                )
                found.append(Entry(contestant, stored_bytes(artifact), artifact.file_bytes, ({},)))
        contestant = Contestant("jaxgpt-torch", artifact.kind, str(artifact.folder), threads)
        entry = Entry(contestant, weight_bytes(artifact), artifact.file_bytes)
        found.append(entry)
        if uncached:
            slow = dataclasses.replace(contestant, cached=False)
            found.append(dataclasses.replace(entry, contestant=slow))
    if run is not None:
        floats = [artifact for artifact in artifacts if artifact.quantization is None] or artifacts[:1]
        contestant = Contestant("jaxgpt-flax", "fp32", str(run), threads)
        found.append(Entry(contestant, weight_bytes(floats[0]), floats[0].file_bytes, ({},)))
    return found


def chosen_peers(every: bool, names: Sequence[str]) -> list[str]:
    """Return the peers that are asked for; UserError for a name that none has."""
    for name in names:
        if name not in PEERS:
            near = difflib.get_close_matches(name, PEERS, n=1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise UserError(f"--peer {name!r} is none of {', '.join(PEERS)}{hint}")
    return list(names) if names else list(PEERS) if every else []


def peer_entries(
    artifacts: Sequence[Artifact], names: Sequence[str], scratch: Path, threads: int
) -> tuple[list[Entry], dict[str, str]]:
    """Convert the float32 artifact for each peer that is installed.

    Returns:
      What is to be measured, and the peers (or rows) that are left out, with why, each said in a line.
    """
    floats = [a for a in artifacts if a.quantization is None and a.config.positions == "learned"]
    found: list[Entry] = []
    left_out: dict[str, str] = {}
    for name in names:
        peer = PEERS[name]
        if not floats:
            left_out[name] = "there is no float32 artifact with learned positions, which is what peers take"
        elif not peer.installed():
            left_out[name] = f"{', '.join(peer.missing())} not installed (pip install {peer.install})"
        else:
            made, failed = _converted(peer, floats[0], scratch, threads)
            found += made
            left_out |= failed
    for name, reason in left_out.items():
        say(f"{name} is left out: {reason}")
    return found, left_out


def _converted(
    peer: Peer, artifact: Artifact, scratch: Path, threads: int
) -> tuple[list[Entry], dict[str, str]]:
    found: list[Entry] = []
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
                    worker = Worker(
                        peer.engine, "jaxgpt_bench.peers.conversion", order, shared_environment(threads)
                    )
                answer = worker.ask(question)
            except (RuntimeError, BrokenPipeError) as error:  # it crashed; the next one gets a new process
                answer, worker = {"error": str(error)}, None
            if "error" in answer:
                failed[f"{peer.engine} {precision}"] = answer["error"]
                continue
            contestant = Contestant(peer.engine, precision, answer["path"], threads)
            sizes = (answer["bytes_per_token"], answer["file_bytes"])
            made = Entry(contestant, *sizes, peer.environments, answer["settings"])
            found.append(made)
            if peer.engine == "transformers":
                slow = dataclasses.replace(contestant, cached=False)
                every = dataclasses.replace(slow, every_logit=True)
                found += [dataclasses.replace(made, contestant=other) for other in (slow, every)]
    finally:
        if worker is not None:
            worker.close()
    return found, failed


def shared_environment(threads: int) -> dict[str, str]:
    """Return the variables that every process gets."""
    return {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", **HUGE_PAGES}


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Put rows of one precision together, in the order in which precisions first appear."""
    order = list(dict.fromkeys(entry.precision for entry in entries))
    return sorted(entries, key=lambda entry: order.index(entry.precision))


def stored_bytes(artifact: Artifact) -> int:
    """Return the bytes of an artifact that one token reads, at the width they are stored with."""
    skipped = ("wpe.", "wte.smooth") if artifact.config.tied else ("wpe.", "wte.")
    return sum(t.nbytes for name, t in artifact.tensors.items() if not name.startswith(skipped))


def with_cache(entry: Entry, config: ModelConfig, positions: float) -> Entry:
    """Add the keys and values that a token reads to a row's bytes: one rule for every engine.

    Args:
      entry: whose bytes are those of its weights.
      config: of the model.
      positions: that an average token attends to.
    """
    if not entry.contestant.cached:
        return entry
    width = 2 if entry.contestant.engine in FLOAT16_CACHES else 4
    read = round(config.n_layer * 2 * config.n_embd * width * positions)
    return dataclasses.replace(entry, bytes_per_token=entry.bytes_per_token + read)


def weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of weights that one token reads: everything but the embedding rows it skips.

    The token embedding counts once, as the head, where it is that. The PyTorch module holds the weights of
    weight-only artifacts in float32.
    """
    skipped = {"wpe"} if artifact.config.tied else {"wpe", "wte"}
    layers = layer_shapes(artifact.config)
    total = 0
    for name, tensor in artifact.tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in skipped or name == "wte.smooth":
            continue
        expanded = artifact.quantization is not None and artifact.quantization.weight_only and layer in layers
        if expanded and part.startswith("weight"):
            total += 4 * math.prod(layers[layer]) if part != "weight_scale" else 0
        else:
            total += tensor.nbytes
    return total
