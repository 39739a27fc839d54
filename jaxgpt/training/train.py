"""`jaxgpt train`: checks what it was told, opens data and run folder, and trains.

    jaxgpt train tiny --data data/stdlib --out runs/tiny --cpu-devices 2

One program for one CPU, several GPUs and several simulated devices: `jax.jit` over a mesh. Running the
same command again resumes from the last checkpoint, bit for bit. The loop is in trainer.py.
"""

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING

from jaxgpt.shared.config import TrainConfig
from jaxgpt.shared.console import Result
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.training.options import TrainOptions, run_config, with_precision

if TYPE_CHECKING:
    from jaxgpt.shared.dataset import Dataset


def train(options: TrainOptions) -> Result:
    """Run `jaxgpt train`.

    Raises:
      UserError: options, data or an earlier run that do not fit.
    """
    from jaxgpt.shared.dataset import open_dataset
    from jaxgpt.training.devices.malloc import keep_freed_memory
    from jaxgpt.training.devices.mesh import make_mesh, use_cpu_devices
    from jaxgpt.training.devices.processes import join_processes, on_main_process
    from jaxgpt.training.run.folder import create_run, lock_run, require_same_training
    from jaxgpt.training.run.init_from import open_init_source
    from jaxgpt.training.trainer import Trainer

    dataset = open_dataset(options.data)
    init_source = None if options.init is None else open_init_source(options.init)
    config = run_config(options, dataset, init_source)
    devices = options.devices
    use_cpu_devices(devices.cpu_devices)
    keep_freed_memory(config.model, config.train, max(devices.cpu_devices, 1))
    join_processes(
        devices.coordinator,
        devices.process_count,
        devices.process_index,
        devices.distributed,
        devices.join_timeout,
    )
    if "precision" not in options.given:
        config = with_precision(config, options.out)
    _require_whole_windows(dataset, config.model.block_size)
    tokenizer = _load_tokenizer_of(dataset)
    mesh = make_mesh(devices.mesh, devices.cpu_devices)
    _require_even_split(config.train, mesh.size)
    params = None
    if init_source is not None:
        params, entry = init_source.read(config.model)
        config = dataclasses.replace(config, init=entry)
    trainer = Trainer(config, dataset, tokenizer, mesh, options.out, params)
    on_main_process(functools.partial(require_same_training, options.out, config))
    if not (options.out / "summary.json").exists():  # else there is nothing left to do
        trainer.require_room()
    with contextlib.ExitStack() as held:

        def create_and_lock() -> None:
            create_run(options.out, config)
            held.enter_context(lock_run(options.out))
            (options.out / "tokenizer").mkdir(exist_ok=True)
            tokenizer.save(options.out / "tokenizer")

        on_main_process(create_and_lock)
        return trainer.run()


def _require_whole_windows(dataset: "Dataset", block_size: int) -> None:
    """Raise UserError unless both splits hold block_size + 1 tokens."""
    from jaxgpt.shared.dataset import windows

    windows(dataset.val, block_size)  # says now what would fail at the first validation
    if len(dataset.train) < block_size + 1:
        raise UserError(
            f"the training split has {len(dataset.train)} tokens, block_size is {block_size}; "
            "prepare more text or lower --block-size"
        )


def _load_tokenizer_of(dataset: "Dataset") -> Tokenizer:
    tokenizer = load_tokenizer(dataset.folder, str(dataset.manifest["tokenizer"]["name"]))
    if tokenizer.sha256 != dataset.tokenizer_sha256:
        raise UserError(f"tokenizer files in {dataset.folder} do not match its manifest; prepare it again")
    return tokenizer


def _require_even_split(train: TrainConfig, devices: int) -> None:
    """Raise UserError unless each device gets as many sequences of a micro-batch as the others."""
    micro = train.batch_size // train.grad_accum_steps
    if micro % devices:
        raise UserError(
            f"a micro-batch of {micro} sequences (batch_size / grad_accum_steps) does not divide over "
            f"{devices} devices; choose a multiple of {devices * train.grad_accum_steps}"
        )
