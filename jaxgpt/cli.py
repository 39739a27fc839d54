"""The console command `jaxgpt`: prepare, train, evaluate, sample, plan."""

from collections.abc import Sequence

from jaxgpt.shared.console import run

COMMANDS = {
    "prepare": "jaxgpt.data.prepare:PrepareOptions:prepare",
    "train": "jaxgpt.training.train:TrainOptions:train",
    "evaluate": "jaxgpt.training.evaluate:EvaluateOptions:evaluate",
    "sample": "jaxgpt.training.sample:SampleOptions:sample",
    "plan": "jaxgpt.training.plan:PlanOptions:plan",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt`; return its exit code."""
    return run("jaxgpt", "Train a GPT-2 in JAX on the devices you have.", COMMANDS, argv)
