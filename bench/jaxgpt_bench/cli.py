"""The console command `jaxgpt-bench`: every measurement that the README and docs speak of."""

from collections.abc import Sequence

from jaxgpt.shared.entry import Command, CtrlC

COMMANDS = {
    "quality": Command(
        "jaxgpt_bench.quality.command:QualityOptions:quality",
        "Compare models on identical tokens.",
    ),
    "evaluate": Command(
        "jaxgpt_bench.evaluate.command:EvaluateOptions:evaluate",
        "Measure what models can do, on the same prompts with the same random numbers.",
    ),
    "outliers": Command(
        "jaxgpt_bench.quality.outliers:OutliersOptions:outliers",
        "Scale channels without changing the model, then quantize it.",
    ),
    "integers": Command(
        "jaxgpt_bench.quality.integers:IntegersOptions:integers",
        "Compare the integers of a quantization-aware training with those of its artifact.",
    ),
    "agreement": Command(
        "jaxgpt_bench.quality.agreement:AgreementOptions:agreement",
        "Compare greedy texts of programs that read the same model.",
    ),
    "generate": Command(
        "jaxgpt_bench.speed.command:SpeedOptions:generate",
        "Measure generation speed, batch 1, greedy.",
    ),
    "native": Command(
        "jaxgpt_bench.speed.native.command:NativeOptions:native",
        "Measure the native engine on a trained model.",
    ),
    "serving": Command(
        "jaxgpt_bench.serving.command:ServingOptions:serving",
        "Measure clients against servers: tokens/s of all, time to first token, time between tokens.",
    ),
    "train": Command(
        "jaxgpt_bench.training.command:TrainingOptions:train",
        "Measure training steps beside PyTorch's.",
    ),
    "prepare": Command(
        "jaxgpt_bench.prepare.command:PrepareBenchOptions:prepare",
        "Measure how fast text becomes tokens, and in how much memory, beside nanoGPT's way.",
    ),
    "recipe": Command(
        "jaxgpt_bench.recipe.command:RecipeOptions:recipe",
        "Measure how many steps each change of the training recipe saves.",
    ),
    "resume-proof": Command(
        "jaxgpt_bench.training.resume_proof:ResumeProofOptions:resume_proof",
        "Kill a small training at random moments and compare it with an undisturbed one, bit for bit.",
    ),
    "report": Command(
        "jaxgpt_bench.report.command:ReportOptions:report",
        "Put the measured figures on one page.",
    ),
    "pages": Command(
        "jaxgpt_bench.pages.command:PagesOptions:pages",
        "Write the tables and the picture of the README and of docs/ from committed results.",
    ),
    "reproduce": Command(
        "jaxgpt_bench.reproduce.command:ReproduceOptions:reproduce",
        "Train a GPT-2, quantize it to 8 and 4 bits and put what was measured on one page; again, to go on.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt-bench`; return its exit code."""
    with CtrlC(argv is None):
        from jaxgpt.shared.console import run

        return run(
            "jaxgpt-bench",
            "Measure models: quality, speed against the ceiling, and a report.",
            COMMANDS,
            argv,
        )
