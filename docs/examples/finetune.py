"""Fine-tune a GPT-2 on your own text, then make it INT8; the loss and a sample of each.

    python docs/examples/finetune.py --model hub:openai-community/gpt2 --text notes.txt --out runs/notes

OUT/base is the imported model, OUT/run the training, OUT/fp32 and OUT/int8 what comes of it. Run again, it
goes on from where it stopped. All devices that JAX finds are used; JAX_NUM_CPU_DEVICES=2 simulates two.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from jaxgpt_export.convert import ConvertOptions, convert
from jaxgpt_export.interchange.import_hf import ImportHfOptions, import_hf
from jaxgpt_export.quantize.command import QuantizeOptions, quantize

import jaxgpt
from jaxgpt.data.prepare import PrepareOptions, prepare


def main() -> None:
    """Import, prepare, train, convert, quantize, compare."""
    parser = argparse.ArgumentParser(description="Fine-tune a GPT-2 on your own text, then make it INT8.")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face GPT-2 folder, or hub:NAME")
    parser.add_argument(
        "--text", required=True, help="a .txt, .jsonl, ... file, a folder of them, or hub:NAME"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step, all devices together")
    parser.add_argument("--block-size", type=int, default=256, help="longest context, tokens")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="share of the text to measure on")
    parser.add_argument("--prompt", default="", help="that the samples continue")
    args = parser.parse_args()
    base, data, fp32, int8 = (args.out / name for name in ("base", "data", "fp32", "int8"))

    for folder, given in ((base, args.model), (data, args.text)):
        note = folder / "made-of.txt"
        if folder.exists() and not (note.exists() and note.read_text() == str(given)):
            raise jaxgpt.UserError(f"{folder} does not say that it was made of {given}; choose another --out")
    if not base.exists():
        import_hf(ImportHfOptions(source=args.model, out=base))
        (base / "made-of.txt").write_text(str(args.model))
    if not data.exists():
        share = args.val_fraction
        prepare(PrepareOptions(source=args.text, tokenizer=str(base), out=data, val_fraction=share))
        (data / "made-of.txt").write_text(args.text)
    training = make_training(args, base, data)
    before = training.evaluate(training.first_state())["val_loss"]
    after = fine_tune(training, args.out / "run")

    if not convert(ConvertOptions(run=args.out / "run", out=fp32, overwrite=True)).passed:
        sys.exit(1)
    options = QuantizeOptions(artifact=fp32, method="int8-dynamic", data=data, out=int8, overwrite=True)
    result = quantize(options)
    if not result.passed:
        sys.exit(1)
    cost = result.figures["quality"]["loss_increase"]

    print(f"validation loss: {before:.4f} before, {after:.4f} after, INT8 changes it by {cost:+.4f}")
    for model in (base, fp32, int8):
        size = (model / "model.safetensors").stat().st_size
        sample = jaxgpt.LLM.load(model).generate(args.prompt, max_new_tokens=60)
        print(f"\n--- {model.name}, {size / 1e6:.1f} MB ---\n{args.prompt}{sample}")


def make_training(args: argparse.Namespace, base: Path, data: Path) -> jaxgpt.Training:
    """Return a training that begins with the imported model."""
    pretrained = jaxgpt.open_init_source(base)
    block_size = min(args.block_size, pretrained.model.block_size)
    model = dataclasses.replace(pretrained.model, block_size=block_size, dropout=0.1)
    train = jaxgpt.TrainConfig(
        max_steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=1e-4,
        embedding_learning_rate=1e-4,
        warmup_steps=args.steps // 10,
        precision=jaxgpt.best_precision(),
    )
    return jaxgpt.Training(model, train, jaxgpt.open_dataset(data), jaxgpt.make_mesh(), init=pretrained)


def fine_tune(training: jaxgpt.Training, folder: Path) -> float:
    """Train, or go on training; return the lowest validation loss, nats per token."""
    steps = training.train.max_steps
    with jaxgpt.RunFolder(folder, training) as run:
        state = run.begin_or_resume()
        for step in range(int(state.step) + 1, steps + 1):
            state, metrics = training.step(state, training.batch(step))
            run.record(step, metrics)
            if step % max(steps // 4, 1) == 0 or step == steps:
                run.save(state, run.validate(state))
        return run.best_val_loss()


if __name__ == "__main__":
    try:
        main()
    except jaxgpt.UserError as error:
        sys.exit(f"error: {error}")
