"""Devices, the mesh over them, and what lies where.

The mesh has two axes. The batch is split over both; parameters and optimizer state are replicated over
`data` and split over `fsdp`.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.shared.config import MAX_CPU_DEVICES
from jaxgpt.shared.errors import UserError

AXES = ("data", "fsdp")


def use_cpu_devices(count: int) -> None:
    """Make JAX use the CPU as `count` devices; nothing for 0.

    Raises:
      UserError: too many, or JAX has started already with other devices.
    """
    if not 0 <= count <= MAX_CPU_DEVICES:
        raise UserError(
            f"cpu_devices ({count}) must lie in [0, {MAX_CPU_DEVICES}]; 0 takes the devices that JAX finds"
        )
    if count == 0:
        return
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started: enough devices will do
        if jax.default_backend() != "cpu" or jax.device_count() < count:
            there = f"{jax.device_count()} {jax.default_backend()} devices"
            raise UserError(f"--cpu-devices {count}: JAX already runs on {there}") from None


def parse_mesh(text: str, device_count: int) -> dict[str, int]:
    """Read "data=4,fsdp=2"; a missing axis takes the devices that are left.

    Args:
      text: axes with sizes; "" puts all devices on data.
      device_count: number of devices to lay out.

    Raises:
      UserError: an unknown axis, no number, or a product that is not device_count.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)=(\d+)\s*", part)
        if not match or match[1] not in AXES or match[1] in sizes or int(match[2]) < 1:
            raise UserError(f"mesh {text!r}: {part!r} is no axis; expected such as data=4,fsdp=2")
        sizes[match[1]] = int(match[2])
    for axis in AXES:
        if axis not in sizes and (axis == "data" or "data" in sizes):
            given = math.prod(sizes.values())
            sizes[axis] = 1 if (axis == "fsdp" and "data" not in text) else max(device_count // given, 1)
    if sizes["data"] * sizes["fsdp"] != device_count:
        raise UserError(
            f"mesh {text!r} needs {sizes['data'] * sizes['fsdp']} devices, there are {device_count}; "
            "their product must match (for a trial on the CPU: --cpu-devices N)"
        )
    return {axis: sizes[axis] for axis in AXES}


def make_mesh(text: str = "", cpu_devices: int = 0) -> Mesh:
    """Build the mesh over all devices (with cpu_devices, over the first so many of each process)."""
    devices = jax.devices()[: cpu_devices * jax.process_count() or None]
    sizes = parse_mesh(text, len(devices))
    grid = np.array(devices).reshape(sizes["data"], sizes["fsdp"])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int, ndim: int) -> NamedSharding:
    """Sharding of a batch array whose sequences lie along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[AXES if i == axis else None for i in range(ndim)]))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Return the sharding of every array of a state (parameters, optimizer state).

    An array is split over `fsdp` along its largest axis that the axis size divides; replicated if none.

    Args:
      mesh: with axes data and fsdp.
      state: pytree of arrays or ShapeDtypeStructs.
    """
    parts = mesh.shape["fsdp"]

    def sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(
            mesh, PartitionSpec(*["fsdp" if i == longest else None for i in range(leaf.ndim)])
        )

    return jax.tree.map(sharding, state)
