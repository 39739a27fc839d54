"""Which block stands on which page, and which file of bench/results/ it comes from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import read_json
from jaxgpt_bench.common.rows import QualityFigures, SpeedFigures
from jaxgpt_bench.common.tables import BUSY, CEILING, ENGINE, PREFILL, RATE, table
from jaxgpt_bench.evaluate.page import answers_block
from jaxgpt_bench.evaluate.rows import EvaluateFigures
from jaxgpt_bench.pages import headline, quality_speed, ratios
from jaxgpt_bench.prepare import command as prepare
from jaxgpt_bench.quality import measure
from jaxgpt_bench.recipe.command import RecipeFigures
from jaxgpt_bench.recipe.page import markdown_block as recipe_block
from jaxgpt_bench.report import page
from jaxgpt_bench.report.command import read_quality, read_speed
from jaxgpt_bench.reproduce.page import render
from jaxgpt_bench.serving.page import markdown_block as serving_block
from jaxgpt_bench.serving.plot import serving_svg
from jaxgpt_bench.serving.rows import ServingFigures

RESULTS = "bench/results"
PICTURE = "docs/images/speed.svg"
SERVING_PICTURE = "docs/images/serving.svg"
QUALITY_PICTURE = "docs/images/quality_speed.svg"
NEWEST = "AMD Zen 5"  # where the programs were measured last, and all of them
MACHINES = {
    NEWEST: "generate_gpt2_zen5.json",
    "AMD Zen 4": "generate_gpt2_zen4.json",
    "Intel Xeon": "generate_gpt2.json",
}
BUSY_MACHINES = {**MACHINES, NEWEST: "generate_gpt2_zen5_busy.json"}
# llama.cpp without its repacked weights, as it crashed there with them.
HANDICAPPED = {("Intel Xeon", "llama.cpp")}
QUALITY = "quality_peers.json"
SPEED_COLUMNS = (ENGINE, RATE, CEILING, PREFILL, BUSY)


@dataclasses.dataclass(frozen=True)
class Block:
    """What stands between two markers.

    Attributes:
      page: path from the repository's folder.
      marker: name of the markers.
      content: makes the block from the folder of results.
    """

    page: str
    marker: str
    content: Callable[[Path], str]


def claim(results: Path) -> str:
    """Return the README's first figures, in words."""
    return headline.claim({cpu: read_speed(results / name) for cpu, name in MACHINES.items()})


def summary(results: Path) -> str:
    """Return the README's small table, and what INT8 costs."""
    speed = read_speed(results / MACHINES[NEWEST])
    return headline.summary(speed, read_quality(results / "reference_quality.json"))


def picture(results: Path) -> str:
    """Return the picture of speeds as SVG."""
    return headline.picture(read_speed(results / MACHINES[NEWEST]))


def serving(results: Path) -> str:
    """Return how fast the server is, beside others."""
    return serving_block(_serving_figures(results))


def serving_picture(results: Path) -> str:
    """Return the plot of the server's speed as SVG."""
    return serving_svg(_serving_figures(results))


def _serving_figures(results: Path) -> ServingFigures:
    path = results / "serving.json"
    found = read_json(path, "figures")
    with damaged(path, "give what `jaxgpt-bench serving --out` wrote"):
        return ServingFigures.from_json(found)


def demo(results: Path) -> str:
    """Return the tables of `make demo`, with GPT-2's shape."""
    path = results / "demo.json"
    found = read_json(path, "report")
    with damaged(path, "give what `jaxgpt-bench report` wrote"):
        return page.markdown_block(page.ReportFigures.from_json(found))


def speed_table(name: str) -> Callable[[Path], str]:
    """Return what makes the table of a speed file: rate, prompts, and beside busy processes."""

    def content(results: Path) -> str:
        found = read_speed(results / name)
        columns = [
            column
            for column in SPEED_COLUMNS
            if column is not BUSY or any(row.busy_share is not None for row in found.rows)
        ]
        return table(columns, found.rows).markdown()

    return content


def speed_ratios(results: Path) -> str:
    """Return how many times as fast as other programs the engine is, on every processor."""
    free = {cpu: _comparable(cpu, read_speed(results / name)) for cpu, name in MACHINES.items()}
    busy = {cpu: _comparable(cpu, read_speed(results / name)) for cpu, name in BUSY_MACHINES.items()}
    return ratios.markdown_block(free, busy)


def _comparable(cpu: str, figures: SpeedFigures) -> SpeedFigures:
    """Leave out what ran there otherwise than it can."""
    rows = tuple(row for row in figures.rows if (cpu, row.engine) not in HANDICAPPED)
    return dataclasses.replace(figures, rows=rows)


def preparation(results: Path) -> str:
    """Return how fast text becomes tokens, and in how much memory."""
    return prepare.markdown_block(
        _prepare_figures(results / "prepare.json"), _prepare_figures(results / "prepare_memory.json")
    )


def _prepare_figures(path: Path) -> prepare.PrepareFigures:
    found = read_json(path, "figures")
    with damaged(path, "give what `jaxgpt-bench prepare --out` wrote"):
        return prepare.PrepareFigures.from_json(found)


def quality(results: Path) -> str:
    """Return the table of all methods on the reference model."""
    return measure.markdown_block(read_quality(results / "reference_quality.json"))


def quality_peers(results: Path) -> str:
    """Return what every program's precisions cost on a trained model."""
    return quality_speed.markdown_block(*_quality_and_speed(results))


def quality_picture(results: Path) -> str:
    """Return the chart of speed against quality as SVG."""
    return quality_speed.picture(*_quality_and_speed(results))


def _quality_and_speed(results: Path) -> tuple[QualityFigures, SpeedFigures, str]:
    return read_quality(results / QUALITY), read_speed(results / MACHINES[NEWEST]), NEWEST


def reproduction(results: Path) -> str:
    """Return the tables of the earlier project's experiment."""
    return render.markdown_block(read_json(results / "reproduce_reference.json", "report"))


def samples(results: Path) -> str:
    """Return what the reference model writes, float32 and INT8."""
    return render.samples_block(read_json(results / "reproduce_reference.json", "report"))


def answers(results: Path) -> str:
    """Return what the model of preset `answers` answers to requests, float32 and INT8."""
    path = results / "answers.json"
    found = read_json(path, "answers")
    with damaged(path, "give what `jaxgpt-bench evaluate --out` wrote"):
        figures = EvaluateFigures.from_json(found)
    if figures.unfinished:
        raise UserError(
            f"{path} was not finished: {', '.join(figures.unfinished)} is missing, in part or whole; run its "
            "command again"
        )
    return answers_block(figures)


def recipe(name: str) -> Callable[[Path], str]:
    """Return what makes the table of a shape's recipes."""

    def content(results: Path) -> str:
        path = results / name
        found = read_json(path, "figures")
        with damaged(path, "give what `jaxgpt-bench recipe` wrote"):
            return recipe_block(RecipeFigures.from_json(found).rows)

    return content


BLOCKS = (
    Block("README.md", "claim", claim),
    Block("README.md", "summary", summary),
    Block("docs/results.md", "table", demo),
    Block("docs/results.md", "ratios", speed_ratios),
    Block("docs/results.md", "xeon", speed_table("generate_gpt2.json")),
    Block("docs/results.md", "zen4", speed_table("generate_gpt2_zen4.json")),
    Block("docs/results.md", "zen5", speed_table("generate_gpt2_zen5.json")),
    Block("docs/results.md", "fastest", speed_table("generate_gpt2_fastest.json")),
    Block("docs/results.md", "zen5-busy", speed_table("generate_gpt2_zen5_busy.json")),
    Block("docs/results.md", "avx2", speed_table("generate_gpt2_avx2.json")),
    Block("docs/reproduction.md", "reproduction", reproduction),
    Block("docs/samples.md", "samples", samples),
    Block("docs/samples.md", "answers", answers),
    Block("docs/quantization.md", "quality", quality),
    Block("docs/quantization.md", "quality-peers", quality_peers),
    Block("docs/training.md", "recipe", recipe("recipe.json")),
    Block("docs/training.md", "recipe-6m", recipe("recipe_6m.json")),
    Block("docs/data.md", "prepare", preparation),
    Block("docs/serving.md", "serving", serving),
)
PICTURES: dict[str, Callable[[Path], str]] = {
    PICTURE: picture,
    SERVING_PICTURE: serving_picture,
    QUALITY_PICTURE: quality_picture,
}
