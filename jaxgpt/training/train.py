"""`jaxgpt train`: the training loop.

    jaxgpt train tiny --data data/stdlib --out runs/tiny --cpu-devices 2

One program for one CPU, several GPUs and several simulated devices: `jax.jit` over a mesh. Running the
same command again resumes from the last checkpoint, bit for bit.
"""

import contextlib
import dataclasses
import functools

from jaxgpt.shared.console import Result
from jaxgpt.shared.dataset import open_dataset, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.presets import find_preset
from jaxgpt.shared.tokenizer import load_tokenizer
from jaxgpt.training.devices.malloc import keep_freed_memory
from jaxgpt.training.devices.mesh import make_mesh, use_cpu_devices
from jaxgpt.training.devices.processes import join_processes, on_main_process
from jaxgpt.training.options import TrainOptions, run_config, with_precision
from jaxgpt.training.run.folder import create_run, lock_run, require_same_training
from jaxgpt.training.run.init_from import open_init_source
from jaxgpt.training.trainer import Trainer


def train(options: TrainOptions) -> Result:
    """Run `jaxgpt train`.

    Raises:
      UserError: options, data or an earlier run that do not fit.
    """
    find_preset(options.preset)
    dataset = open_dataset(options.data)
    initial = None if options.init is None else open_init_source(options.init)
    config = run_config(options, dataset, initial)
    use_cpu_devices(options.cpu_devices)
    keep_freed_memory(config.model, config.train, max(options.cpu_devices, 1))
    join_processes(
        options.coordinator,
        options.process_count,
        options.process_index,
        options.distributed,
        options.join_timeout,
    )
    if options.precision is None:
        config = with_precision(config, options.out)
    windows(dataset.val, config.model.block_size)  # says now what would fail at the first validation
    if len(dataset.train) < config.model.block_size + 1:
        raise UserError(
            f"the training split has {len(dataset.train)} tokens, block_size is {config.model.block_size}; "
            "prepare more text or lower --block-size"
        )
    tokenizer = load_tokenizer(options.data, str(dataset.manifest["tokenizer"]["name"]))
    if tokenizer.sha256 != dataset.tokenizer_sha256:
        raise UserError(f"tokenizer files in {options.data} do not match its manifest; prepare it again")
    mesh = make_mesh(options.mesh, options.cpu_devices)
    micro = config.train.batch_size // config.train.grad_accum_steps
    if micro % mesh.size:
        raise UserError(
            f"a micro-batch of {micro} sequences (batch_size / grad_accum_steps) does not divide over "
            f"{mesh.size} devices; choose a multiple of {mesh.size * config.train.grad_accum_steps}"
        )

    params = None
    if initial is not None:
        params, entry = initial.read(config.model)
        config = dataclasses.replace(config, init=entry)
    trainer = Trainer(config, dataset, tokenizer, mesh, options.out, params)
    on_main_process(functools.partial(require_same_training, options.out, config))
    if not (options.out / "summary.json").exists():  # else there is nothing left to do
        trainer.require_room()
    with contextlib.ExitStack() as held:

        def claim() -> None:
            create_run(options.out, config)
            held.enter_context(lock_run(options.out))
            (options.out / "tokenizer").mkdir(exist_ok=True)
            tokenizer.save(options.out / "tokenizer")

        on_main_process(claim)
        return trainer.run()
