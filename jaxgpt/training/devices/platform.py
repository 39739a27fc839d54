"""Which platform JAX is going to run on, told before it starts: some settings can't be changed afterwards."""

import importlib.metadata
import importlib.util
import os
import pkgutil
from collections.abc import Collection, Mapping
from pathlib import Path

# JAX's name of an accelerator -> part of its plugin's name, and files of which one is there with a device.
ACCELERATORS = {
    "tpu": ("libtpu", ("dev/accel0", "dev/vfio/0")),
    "cuda": ("cuda", ("dev/nvidiactl", "dev/nvidia0", "dev/dxg")),  # the last one is WSL2's
    "rocm": ("rocm", ("dev/kfd",)),
}
NO_CUDA_DEVICE = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide every GPU


def expected_platform(
    wanted: str | None,
    *,
    plugins: Collection[str] | None = None,
    environment: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
) -> str:
    """Return the platform that JAX will run on: "cpu", "gpu", "tpu", or another one that is asked for.

    A guess, for JAX knows when it has started: a GPU whose driver fails counts as one here.

    Args:
      wanted: platforms in order of preference, such as "cuda,cpu": what jax.config.jax_platforms is, from
        JAX_PLATFORMS; None or "" leaves it to JAX.
      plugins: names of JAX's plugins, as installed_plugins returns them; the installed ones if not given.
      environment: whose CUDA_VISIBLE_DEVICES counts.
      root: the folder that dev/ lies in.
    """
    names = installed_plugins() if plugins is None else plugins
    hidden = environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in NO_CUDA_DEVICE
    order = (wanted or "tpu,gpu,cpu").lower().replace("gpu", "cuda,rocm")
    for platform in (part.strip() for part in order.split(",")):
        if platform not in ACCELERATORS:
            return platform
        plugin, devices = ACCELERATORS[platform]
        installed = any(plugin in name for name in names) and not (platform == "cuda" and hidden)
        if installed and any((root / path).exists() for path in devices):
            return "tpu" if platform == "tpu" else "gpu"
    return "cpu"


def installed_plugins() -> set[str]:
    """Return the names of JAX's plugins, such as xla_cuda12, found where JAX looks; libtpu counts as one."""
    names = {point.value.rpartition(".")[2] for point in importlib.metadata.entry_points(group="jax_plugins")}
    namespace = importlib.util.find_spec("jax_plugins")
    if namespace is not None and namespace.submodule_search_locations is not None:
        names |= {module.name for module in pkgutil.iter_modules(namespace.submodule_search_locations)}
    if importlib.util.find_spec("libtpu") is not None:
        names.add("libtpu")
    return names
