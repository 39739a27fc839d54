"""`jaxgpt-bench train`: the time of a training step, beside PyTorch's and beside the peak of the device.

    jaxgpt-bench train tiny --vocab-size 50257
    jaxgpt-bench train gpt2 --precision bf16 --batch-size 32 --grad-accum-steps 1     (on a GPU)

This trainer and transformers' GPT-2 (torch.compile, SDPA, fused AdamW) take the same steps on the same
batches from the same weights, each in a process of its own, in turns. On a shared CPU the cpu-seconds of a
step say more than its seconds. The ceiling is the rate of a plain matrix product, measured in the same
rounds; MFU is of the datasheet's peak, where there is one.
"""

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json
from jaxgpt_bench.common.rows import Spread, StepFigures
from jaxgpt_bench.training.options import TrainingOptions


def train(options: TrainingOptions) -> Result:
    """Run `jaxgpt-bench train`."""
    if options.rounds < 1 or options.steps < 1 or not options.devices or min(options.devices) < 1:
        raise UserError("--rounds, --steps and --devices must be at least 1")
    from jaxgpt_bench.common.tables import STEPS, table
    from jaxgpt_bench.training.rounds import measure_steps

    prepare_output_file(options.out)
    figures = measure_steps(options)
    stderr.print(table(STEPS, figures.rows).terminal())
    show(figures)
    written = figures.to_json()
    if options.out is not None:
        write_json(options.out, written)
    return Result(written)


def show(figures: StepFigures) -> None:
    """Say what the ratios and rates rest on."""
    peak = figures.datasheet_tflops
    known = f"{peak:g} TFLOP/s" if peak else "not known, so no MFU"
    say(
        f"{figures.flops_per_token:.3g} FLOPs a token; a plain product reaches "
        f"{figures.product_tflops.median:.3g} TFLOP/s; datasheet of {figures.device}: {known}"
    )
    for row in figures.rows:
        found = row.against_pytorch
        if found is not None:
            say(
                f"{row.name} against PyTorch: {_ratio(found.step_time_ratio)} of its step time, "
                f"{_ratio(found.cpu_time_ratio)} of its cpu time; "
                f"losses apart by {found.first_losses_differ_by:.1e} at first"
            )


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.min:.2f}-{ratio.max:.2f})"
