"""The README's first screen: a claim, a picture, a small table. Each is a function of measured figures."""

from collections.abc import Iterable, Mapping

from jaxgpt.shared.errors import UserError
from jaxgpt_bench.common.formatting import difference_text, rate_text
from jaxgpt_bench.common.plots import Bar, program_bars
from jaxgpt_bench.common.rows import QualityFigures, SpeedFigures, SpeedRow
from jaxgpt_bench.common.tables import Table
from jaxgpt_bench.speed.programs import NATIVE, own_engines

METHOD = "int8-dynamic"  # of this project, the one that the README shows
FLOAT32 = "torch-fp32"
LLAMA_CPP, QUANTIZE_DYNAMIC = "llama.cpp", "torch-quantize-dynamic"
NAMES = {
    "jaxgpt-native": "jaxgpt",
    "jaxgpt-torch": "jaxgpt, PyTorch module",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ctranslate2": "CTranslate2",
    "torchao": "torchao",
    "executorch": "ExecuTorch",
    QUANTIZE_DYNAMIC: "PyTorch quantize_dynamic",
    LLAMA_CPP: "llama.cpp",
}
# What of their INT8 files is float32: PyTorch's programs round when they are loaded.
NO_INT8 = {
    QUANTIZE_DYNAMIC: " (float32)",
    "torchao": " (float32)",
    "executorch": " (embedding float32)",
    "onnxruntime": " (embedding float32)",
}
OTHERS = 4  # other programs in the README's table
PRECISIONS = {
    "fp32": "float32",
    "int8-dynamic": "INT8",
    "int8-static": "INT8 static",
    "int8-weight-only": "INT8 weights only",
}


def label(row: SpeedRow) -> str:
    """Name a program and its precision as people say it."""
    name = NAMES.get(row.engine, row.engine)
    if row.engine == LLAMA_CPP and row.precision == "int8-weight-only":
        return f"{name} Q8_0"  # its own name of its 8 bits
    return f"{name}, {PRECISIONS.get(row.precision, row.precision)}"


def int8_rows(figures: SpeedFigures) -> list[SpeedRow]:
    """Return one INT8 row a program, fastest first: METHOD's of this project, the fastest of others."""
    best: dict[str, SpeedRow] = {}
    for row in figures.rows:
        counts = row.precision == METHOD if row.engine in own_engines() else row.precision.startswith("int8")
        if counts and row.cached and not row.isa:
            best[row.engine] = max(row, best.get(row.engine, row), key=_rate)
    return sorted(best.values(), key=_rate, reverse=True)


def float32_rows(figures: SpeedFigures) -> list[SpeedRow]:
    """Return the float32 rows with a KV cache, fastest first."""
    found = [row for row in figures.rows if row.precision == "fp32" and row.cached]
    return sorted(found, key=_rate, reverse=True)


def _rate(row: SpeedRow) -> float:
    return row.decode_tokens_per_s.median


def _of(engine: str, rows: Iterable[SpeedRow]) -> SpeedRow:
    for row in rows:
        if row.engine == engine:
            return row
    raise UserError(f"the speed figures have no row of {engine}; measure it with `jaxgpt-bench generate`")


def _others(rows: Iterable[SpeedRow], precision: str = "INT8") -> list[SpeedRow]:
    """Return the rows of other programs, at least one, in their order."""
    if found := [row for row in rows if row.engine not in own_engines()]:
        return found
    raise UserError(
        f"the speed figures have no {precision} of another program; measure it with `jaxgpt-bench generate`"
    )


def claim(machines: Mapping[str, SpeedFigures]) -> str:
    """Return the README's claim about speed.

    Args:
      machines: figures of GPT-2's shape, by the processor's name; the first has the most programs.
    """
    (cpu, figures), *others = machines.items()
    rows = int8_rows(figures)
    ours, theirs = _rate(_of(NATIVE.engine, rows)), _others(rows)
    sizes = [_of(NATIVE.engine, each).file_mb for each in (rows, float32_rows(figures))]
    sentences = (
        f"A GPT-2 of 124M parameters (random weights) writes **{rate_text(ours)} tokens/s** on "
        f"{figures.settings.threads} cores of an {cpu}.",
        ", ".join(
            f"{NAMES[each.engine]}{verb} {rate_text(_rate(each))}"
            for each, verb in zip(theirs, (" writes", ""), strict=False)
        )
        + ".",
        *(_against_best(*other) for other in others),
        f"The INT8 file is {sizes[0]:.0f} MB, the float32 one {sizes[1]:.0f} MB.",
    )
    return " ".join(sentences)


def _against_best(cpu: str, figures: SpeedFigures) -> str:
    rows = int8_rows(figures)
    best, ours = _others(rows)[0], _rate(_of(NATIVE.engine, rows))
    return f"On an {cpu} it is {rate_text(ours)} against {NAMES[best.engine]}'s {rate_text(_rate(best))}."


def summary(figures: SpeedFigures, quality: QualityFigures) -> str:
    """Return the README's table of speed, and a line on what INT8 costs a trained model."""
    rows = int8_rows(figures)
    shown = [
        _of(NATIVE.engine, rows),
        *_others(rows)[:OTHERS],
        _others(float32_rows(figures), "float32")[0],
    ]
    cells = [
        (label(row), rate_text(_rate(row)), f"{row.ceiling_share:.0%}", _file_text(row)) for row in shown
    ]
    first = tuple(f"<b>{cell}</b>" for cell in cells[0])  # Markdown's own stars are escaped in tables
    titles = ("program", "tokens/s", "of what the memory allows", "file, MB")
    speeds = Table(titles, (first, *cells[1:])).markdown()
    models = {row.name: row for row in quality.rows}
    before, after = models[FLOAT32], models[METHOD]
    cost = difference_text(after.loss_increase, after.difference_error)
    sentences = (
        f"What INT8 costs a trained model, on {quality.val_tokens:,} held-out tokens: the loss goes from "
        f"{before.val_loss:.4f} to {after.val_loss:.4f} nats a token ({cost}).",
        f"The most likely token stays the same at {after.top1_agreement:.1%} of the positions.",
        f"The file shrinks from {before.size_mb:.1f} to {after.size_mb:.1f} MB.",
    )
    return f"{speeds}\n\n{' '.join(sentences)}"


def _file_text(row: SpeedRow) -> str:
    """Return MB of what is loaded, and what of it is no INT8."""
    return f"{row.file_mb:.0f}{NO_INT8.get(row.engine, '') if row.precision.startswith('int8') else ''}"


def picture(figures: SpeedFigures) -> str:
    """Return the README's picture: every program's INT8, then every program's float32."""
    groups = [
        ("INT8", [_bar(row) for row in int8_rows(figures)]),
        ("float32", [_bar(row) for row in float32_rows(figures)]),
    ]
    settings, machine = figures.settings, figures.machine
    return program_bars(
        groups,
        f"tokens/s, GPT-2's shape (124M, random weights), batch 1, {settings.tokens} tokens, "
        f"{settings.threads} threads of an {machine.cpu}",
    )


def _bar(row: SpeedRow) -> Bar:
    name = label(row)
    for heading in ("INT8", "float32"):  # stands above the bars
        name = name.removesuffix(f", {heading}").replace(f", {heading} ", ", ")
    return Bar(
        label=name,
        rate=row.decode_tokens_per_s,
        ceiling=row.shown_ceiling,
        share=row.ceiling_share,
        highlighted=row.engine == NATIVE.engine,
    )
