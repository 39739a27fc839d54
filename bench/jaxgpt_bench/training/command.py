"""`jaxgpt-bench train`: the time of a training step, beside PyTorch's and beside the peak of the device.

    jaxgpt-bench train tiny --vocab-size 50257
    jaxgpt-bench train gpt2 --precision bf16 --batch-size 64 --block-size 1024 --profile       (on a GPU)
    jaxgpt-bench train gpt2 --batch-size 64 --variant remat=true --variant optimizer=adamw,loss_chunks=16

This trainer and transformers' GPT-2 (torch.compile, SDPA, fused AdamW) take the same steps on the same
batches from the same weights, each in a process of its own, in turns. On a shared CPU the cpu-seconds of a
step say more than its seconds. The ceiling is the rate of a plain matrix product, measured in the same
rounds; MFU is of the datasheet's peak, where there is one. Settings are the preset's; where its optimizer is
not PyTorch's AdamW, this trainer is measured with both. --profile shows where a step's time goes.
"""

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json
from jaxgpt_bench.common.formatting import span_text
from jaxgpt_bench.common.step_rows import StepFigures
from jaxgpt_bench.noise.verdict import warn
from jaxgpt_bench.training.options import TrainingOptions


def train(options: TrainingOptions) -> Result:
    """Run `jaxgpt-bench train`."""
    if options.rounds < 1 or options.steps < 1 or not options.devices or min(options.devices) < 1:
        raise UserError("--rounds, --steps and --devices must be at least 1")
    from jaxgpt_bench.common.tables import MORE_OF_STEPS, STEPS, table
    from jaxgpt_bench.profile.show import show_profiles
    from jaxgpt_bench.training.rounds import measure_steps

    prepare_output_file(options.out)
    figures = measure_steps(options)
    show_profiles(figures.rows)
    stderr.print(table(STEPS, figures.rows).terminal())
    stderr.print(table(MORE_OF_STEPS, figures.rows).terminal())
    show(figures)
    warn(figures.noise)
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
            apart = found.first_losses_differ_by
            said = "another optimizer" if apart is None else f"losses apart by {apart:.1e} at first"
            say(
                f"{row.name} against {found.row}: {span_text(found.step_time_ratio)} of its step time, "
                f"{span_text(found.cpu_time_ratio)} of its cpu time; {said}"
            )
    for name, why in (figures.left_out or {}).items():
        say(f"left out: {name}, which {why}")
