"""The console command `jaxgpt-bench`: every measurement that the README and docs speak of."""

from collections.abc import Sequence

from jaxgpt.shared.console import run

COMMANDS = {
    "quality": "bench.quality:QualityOptions:quality",
    "outliers": "bench.outliers:OutliersOptions:outliers",
    "integers": "bench.integers:IntegersOptions:integers",
    "agreement": "bench.agreement:AgreementOptions:agreement",
    "generate": "bench.generate:GenerateOptions:generate",
    "native": "bench.native:NativeOptions:native",
    "train": "bench.train:TrainBenchOptions:train_bench",
    "resume-proof": "bench.resume_proof:ResumeProofOptions:resume_proof",
    "report": "bench.report:ReportOptions:report",
    "reproduce": "bench.reproduce.command:ReproduceOptions:reproduce",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt-bench`; return its exit code."""
    return run(
        "jaxgpt-bench", "Measure models: quality, speed against the ceiling, and a report.", COMMANDS, argv
    )
