"""`jaxgpt-bench prepare`: text to tokens of gpt2's tokenizer, `jaxgpt prepare` beside nanoGPT's way.

    jaxgpt-bench prepare --sizes 310 --out prepare.json
    jaxgpt-bench prepare --sizes 1000 3000 --ways jaxgpt --out memory.json

The text is the Python source that is installed here. jaxgpt deduplicates, splits by hash, drops validation
documents that share 50 tokens with training and hashes what it writes; nanoGPT's way does none of it.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json
from jaxgpt.shared.machine import usable_cores
from jaxgpt_bench.common.json_data import JsonData
from jaxgpt_bench.common.provenance import ROOT, provenance
from jaxgpt_bench.common.rows import Provenance
from jaxgpt_bench.common.tables import Column, table
from jaxgpt_bench.noise.meter import NoiseMeter
from jaxgpt_bench.noise.verdict import warn
from jaxgpt_bench.prepare.measured import Measured, measured
from jaxgpt_bench.prepare.source import write_source

Way = Literal["jaxgpt", "nanogpt"]


@dataclasses.dataclass(frozen=True)
class PrepareBenchOptions:
    """Measure how fast text becomes tokens, and in how much memory, beside nanoGPT's way.

    Attributes:
      out: JSON file of the figures.
      sizes: of the text, in MB (10^6 bytes).
      ways: whose; each takes its turn on each size.
      workers: processes; 0 takes one for each core that this process may use.
      rounds: turns of each.
      work: folder in which text and tokens lie for the time, five times the size; the system's temporary
        folder if not given. It is made where it is missing.
      accept_noise: take the figures for tables however busy the machine is; the JSON file says so.
      json: print one JSON document with all figures on stdout.
    """

    out: Path
    sizes: tuple[int, ...] = (310,)
    ways: tuple[Way, ...] = ("jaxgpt", "nanogpt")
    workers: int = 0
    rounds: int = 1
    work: Path | None = None
    accept_noise: bool = False
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareRow(JsonData):
    """One preparation.

    Attributes:
      way: jaxgpt or nanogpt.
      source_bytes: of the .jsonl.
      documents: in it.
      workers: processes that were asked for.
      seconds: from the start of the command to its end.
      mb_per_s: source_bytes / seconds, 10^6 bytes.
      cpu_seconds: of all processes.
      cores_busy: cpu_seconds / (seconds x workers).
      peak_memory_mb: of all processes together, shared pages once.
      load: of the machine when it began, over the last minute.
    """

    way: str
    source_bytes: int
    documents: int
    workers: int
    seconds: float
    mb_per_s: float
    cpu_seconds: float
    cores_busy: float
    peak_memory_mb: float
    load: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareFigures(Provenance):
    """What `jaxgpt-bench prepare` leaves.

    Attributes:
      tokenizer: with which all ways encode.
      rows: in the order in which they were measured.
    """

    tokenizer: str
    rows: tuple[PrepareRow, ...]


def prepare(options: PrepareBenchOptions) -> Result:
    """Run `jaxgpt-bench prepare`."""
    if not options.sizes or min(options.sizes) < 1 or options.rounds < 1 or options.workers < 0:
        raise UserError("--sizes and --rounds must be at least 1, --workers at least 0")
    prepare_output_file(options.out)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    about, meter = provenance(), NoiseMeter()
    rows: list[PrepareRow] = []
    with tempfile.TemporaryDirectory(prefix="jaxgpt-prepare-", dir=options.work) as folder:
        if "nanogpt" in options.ways:
            from jaxgpt_bench.prepare.nanogpt_way import fill_cache

            fill_cache(Path(folder) / "tiktoken")
        for size in options.sizes:
            source = Path(folder) / "source.jsonl"
            say(f"writing {size} MB of Python files")
            documents = write_source(source, size * 1_000_000)
            workers = options.workers or usable_cores()
            turns = options.ways * options.rounds
            rows += [_row(way, Path(folder), source, documents, workers) for way in turns]
    about = dataclasses.replace(about, noise=meter.noise(accepted=options.accept_noise))
    figures = PrepareFigures(**vars(about), tokenizer="gpt2", rows=tuple(rows))
    write_json(options.out, figures.to_json())
    stderr.print(table(COLUMNS, figures.rows).terminal())
    warn(figures.noise)
    return Result(figures.to_json())


def _row(way: Way, folder: Path, source: Path, documents: int, workers: int) -> PrepareRow:
    load = os.getloadavg()[0]
    out = folder / "out"
    found = _measure(way, folder, source, out, workers)
    shutil.rmtree(out)
    size = source.stat().st_size
    row = PrepareRow(
        way=way,
        source_bytes=size,
        documents=documents,
        workers=workers,
        seconds=found.seconds,
        mb_per_s=size / 1e6 / found.seconds,
        cpu_seconds=found.cpu_seconds,
        cores_busy=found.cpu_seconds / found.seconds / workers,
        peak_memory_mb=found.peak_memory_bytes / 1e6,
        load=load,
    )
    say(f"{way}: {size / 1e6:,.0f} MB in {row.seconds:.1f} s, {row.mb_per_s:.1f} MB/s")
    return row


def _measure(way: Way, folder: Path, source: Path, out: Path, workers: int) -> Measured:
    paths = [str(ROOT), str(ROOT / "bench"), str(ROOT / "export"), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if way == "jaxgpt":
        line = ["-m", "jaxgpt", "prepare", "--source", str(source), "--tokenizer", "gpt2"]
        line += ["--workers", str(workers), "--out", str(out)]
    else:
        out.mkdir()
        environment["TIKTOKEN_CACHE_DIR"] = str(folder / "tiktoken")
        line = ["-m", "jaxgpt_bench.prepare.nanogpt_way", str(source), str(out), str(workers)]
    return measured([sys.executable, *line], environment)


def markdown_block(speed: PrepareFigures, memory: PrepareFigures) -> str:
    """Return the block of docs/data.md: speed beside nanoGPT's way, and memory at several sizes."""
    machine = speed.machine
    sizes = ", ".join(
        f"{row.peak_memory_mb:,.0f} MB for {row.source_bytes / 1e9:.1f} GB" for row in memory.rows
    )
    return (
        f"Python files as `.jsonl`, gpt2's tokenizer, {machine.cores} cores ({machine.cpu}); jaxgpt "
        "deduplicates, looks for overlap and hashes, which nanoGPT's `prepare.py` (`datasets.map`, tiktoken) "
        "does not:\n\n"
        f"{table(COLUMNS, speed.rows).markdown()}\n\n"
        f"Peak memory of all processes of jaxgpt: {sizes}. Measured by `jaxgpt-bench prepare` "
        "([prepare.json](../bench/results/prepare.json), "
        "[prepare_memory.json](../bench/results/prepare_memory.json))."
    )


COLUMNS = (
    Column[PrepareRow]("way", lambda row: row.way),
    Column[PrepareRow]("MB", lambda row: f"{row.source_bytes / 1e6:,.0f}"),
    Column[PrepareRow]("documents", lambda row: f"{row.documents:,}"),
    Column[PrepareRow]("processes", lambda row: str(row.workers)),
    Column[PrepareRow]("seconds", lambda row: f"{row.seconds:.1f}"),
    Column[PrepareRow]("MB/s", lambda row: f"{row.mb_per_s:.1f}"),
    Column[PrepareRow]("cores busy", lambda row: f"{row.cores_busy:.0%}"),
    Column[PrepareRow]("peak memory, MB", lambda row: f"{row.peak_memory_mb:,.0f}"),
    Column[PrepareRow]("load before", lambda row: f"{row.load:.1f}"),
)
