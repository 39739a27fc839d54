"""The console command `jaxgpt-bench`: every measurement that the README and docs speak of."""

from collections.abc import Sequence

from jaxgpt.shared.console import run

COMMANDS = {
    "quality": "jaxgpt_bench.quality.command:QualityOptions:quality",
    "outliers": "jaxgpt_bench.quality.outliers:OutliersOptions:outliers",
    "integers": "jaxgpt_bench.quality.integers:IntegersOptions:integers",
    "agreement": "jaxgpt_bench.quality.agreement:AgreementOptions:agreement",
    "generate": "jaxgpt_bench.speed.command:SpeedOptions:generate",
    "native": "jaxgpt_bench.speed.native:NativeOptions:native",
    "train": "jaxgpt_bench.training.command:TrainingOptions:train",
    "resume-proof": "jaxgpt_bench.training.resume_proof:ResumeProofOptions:resume_proof",
    "report": "jaxgpt_bench.report.command:ReportOptions:report",
    "pages": "jaxgpt_bench.pages.command:PagesOptions:pages",
    "reproduce": "jaxgpt_bench.reproduce.command:ReproduceOptions:reproduce",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt-bench`; return its exit code."""
    return run(
        "jaxgpt-bench", "Measure models: quality, speed against the ceiling, and a report.", COMMANDS, argv
    )
