"""The console command `jaxgpt`: prepare, train, evaluate, sample, plan."""

from collections.abc import Sequence

from jaxgpt.shared.entry import Command, CtrlC

ABOUT = (
    "Train a GPT-2 in JAX on the devices you have. What was trained is converted, quantized and run by "
    "jaxgpt-export, and measured by jaxgpt-bench."
)
COMMANDS = {
    "prepare": Command(
        "jaxgpt.data.prepare:PrepareOptions:prepare",
        "Turn source text into a dataset folder of tokens.",
    ),
    "train": Command(
        "jaxgpt.training.train:TrainOptions:train",
        "Train a GPT-2; running the same command again resumes.",
    ),
    "evaluate": Command(
        "jaxgpt.training.evaluate:EvaluateOptions:evaluate",
        "Measure a run's validation loss over the whole validation split.",
    ),
    "sample": Command("jaxgpt.training.sample:SampleOptions:sample", "Continue a prompt with a trained run."),
    "plan": Command(
        "jaxgpt.training.plan:PlanOptions:plan",
        "Say what a training takes on each device, and the largest micro-batch that fits.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt`; return its exit code."""
    with CtrlC(argv is None):
        from jaxgpt.shared.console import run

        return run("jaxgpt", ABOUT, COMMANDS, argv)
