"""What `jaxgpt-bench generate` may be told."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
    """Measure generation speed, batch 1, greedy.

    Attributes:
      artifact: artifact folders.
      run: run folder: its Flax model is measured too.
      preset: measure a model of this shape with random weights, in float32 and quantized in every way.
      kind: only artifacts of these kinds: fp32, int8-dynamic, ...; other programs want fp32 among them.
      native_only: leave out the PyTorch module of each artifact.
      tokens: to generate in each round.
      threads: CPU threads; 0 takes all cores that this process may use.
      rounds: in each of which everyone generates once.
      isa: the native engine also with these instruction sets (avx2, portable, ...).
      uncached: also without KV cache (slow: every token runs the whole text again).
      busy: after the rounds everyone with a KV cache is started again, set as is fastest beside so many other
        processes that compete for the cores; in as many rounds it generates three times what takes it a
        second when free, never more at once than by --tokens. 0 leaves it out.
      prefill: tokens of a prompt that is timed as well in each round; a shorter context bounds it.
      peers: also every other program that is installed, with the same float32 weights: see the folder peers.
        transformers' GPT-2 runs with its cache, without, and without and with the logits of every
        position (`model(ids).logits[:, -1]`, the earlier project's way).
      peer: only these of them, by their engine names.
      accept_noise: take the figures for tables however busy the machine is; the JSON file says so.
      out: also write the figures into this JSON file, and a plot beside it (.svg, .png).
      json: print one JSON document with all figures on stdout.
    """

    artifact: tuple[Path, ...] = ()
    run: Path | None = None
    preset: str | None = None
    kind: tuple[str, ...] = ()
    native_only: bool = False
    tokens: int = 250
    threads: int = 0
    rounds: int = 3
    isa: tuple[str, ...] = ()
    uncached: bool = False
    busy: int = 0
    prefill: int = 512
    peers: bool = False
    peer: tuple[str, ...] = ()
    accept_noise: bool = False
    out: Path | None = None
    json: bool = False
