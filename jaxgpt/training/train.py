"""`jaxgpt train`: checks what it was told, opens data and run folder, and trains.

    jaxgpt train tiny --data data/stdlib --out runs/tiny --cpu-devices 2

One program for one CPU, several GPUs and several simulated devices: `jax.jit` over a mesh. Running the
same command again resumes from the last checkpoint, bit for bit. The loop is in trainer.py.
"""

import time

from jaxgpt.shared.console import Result
from jaxgpt.shared.files import check_output_folder
from jaxgpt.training.options import TrainOptions, as_begun, run_config, with_settings_of_run


def train(options: TrainOptions) -> Result:
    """Run `jaxgpt train`.

    Raises:
      UserError: options, data or an earlier run that do not fit.
    """
    started = time.perf_counter()
    import jax

    from jaxgpt.shared.dataset import open_dataset
    from jaxgpt.training.devices.compilation_cache import compilation_cache
    from jaxgpt.training.devices.malloc import keep_freed_memory
    from jaxgpt.training.devices.mesh import make_mesh, use_cpu_devices
    from jaxgpt.training.devices.platform import expected_platform
    from jaxgpt.training.devices.processes import ending_the_others, join_processes
    from jaxgpt.training.run.init_from import as_all_know, open_init_source
    from jaxgpt.training.run.training import Training
    from jaxgpt.training.trainer import Trainer

    check_output_folder(options.out)
    if options.override:
        options = with_settings_of_run(options)
    dataset = open_dataset(options.data)
    init_source = None if options.init is None else open_init_source(options.init, options.out)
    config = run_config(options, dataset, init_source)
    devices = options.devices
    use_cpu_devices(devices.cpu_devices)
    if expected_platform(jax.config.values["jax_platforms"]) == "cpu":
        keep_freed_memory(config.model, config.train, max(devices.cpu_devices, 1))
    join_processes(
        devices.coordinator,
        devices.process_count,
        devices.process_index,
        devices.distributed,
        devices.join_timeout,
    )
    with ending_the_others(), compilation_cache(options.compilation_cache):
        config = as_begun(config, options.out, options.given)
        mesh = make_mesh(devices.mesh, devices.cpu_devices)
        init = as_all_know(init_source)
        training = Training(config.model, config.train, dataset, mesh, init=init, preset=config.preset)
        return Trainer(training, options.out, options.override, started).run()
