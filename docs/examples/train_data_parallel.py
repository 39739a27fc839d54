"""Data-parallel training over every device that JAX finds, in a loop of its own.

    python docs/examples/train_data_parallel.py --data data/stdlib --out runs/mine

Run again, it goes on from its last checkpoint, bit for bit. JAX_NUM_CPU_DEVICES=2 simulates two devices.
"""

import argparse
import sys
from pathlib import Path

import jax
from jaxgpt_export.convert import ConvertOptions, convert

import jaxgpt


def main() -> None:
    """Train, then convert."""
    parser = argparse.ArgumentParser(description="Train over all devices, in a loop of its own.")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder, of jaxgpt prepare")
    parser.add_argument("--out", type=Path, required=True, help="run folder; OUT/fp32 is the artifact")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--distributed", action="store_true", help="one of several processes (Slurm)")
    args = parser.parse_args()
    if args.distributed:
        jax.distributed.initialize()

    dataset = jaxgpt.open_dataset(args.data)
    model = jaxgpt.ModelConfig(dataset.vocab_size, block_size=128, n_layer=4, n_head=4, n_embd=128)
    precision = jaxgpt.best_precision()
    train = jaxgpt.TrainConfig(max_steps=args.steps, batch_size=32, learning_rate=2e-3, precision=precision)
    training = jaxgpt.Training(model, train, dataset, jaxgpt.make_mesh())

    with jaxgpt.RunFolder(args.out, training) as run:
        state = run.begin_or_resume()
        for step in range(int(state.step) + 1, args.steps + 1):
            state, metrics = training.step(state, training.batch(step))
            run.record(step, metrics)
            if step % args.save_every == 0 or step == args.steps:
                run.save(state, run.validate(state))

    if jax.process_count() == 1:  # else afterwards, in one process: jaxgpt-export convert
        passed = convert(ConvertOptions(run=args.out, out=args.out / "fp32", overwrite=True)).passed
        sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
