import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxgpt.shared.errors import UserError
from jaxgpt.training.devices.mesh import make_mesh, parse_mesh, state_shardings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (8, 1)),
        ("data=8", (8, 1)),
        ("fsdp=8", (1, 8)),
        ("fsdp=4", (2, 4)),
        ("data=2", (2, 4)),
        ("data=2,fsdp=4", (2, 4)),
        ("fsdp=2,data=4", (4, 2)),
    ],
)
def test_a_missing_axis_takes_the_devices_that_are_left(text: str, expected: tuple[int, int]) -> None:
    assert tuple(parse_mesh(text, 8).values()) == expected


@pytest.mark.parametrize(
    "text", ["data=3", "data=4,fsdp=4", "tensor=8", "data", "data=0", "data=2,data=4", "fsdp=16"]
)
def test_a_mesh_that_does_not_fit_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UserError, match=f"mesh '{text}'"):
        parse_mesh(text, 8)


def test_fsdp_splits_the_largest_divisible_axis_and_replicates_the_rest() -> None:
    mesh = make_mesh("data=2,fsdp=4", 8)
    state = {"a": jnp.zeros((8, 12)), "b": jnp.zeros((6, 10)), "c": jnp.zeros(()), "d": jnp.zeros((16, 12))}
    specs = {name: sharding.spec for name, sharding in state_shardings(mesh, state).items()}
    assert specs["a"] == PartitionSpec(None, "fsdp")
    assert specs["b"] == specs["c"] == PartitionSpec()
    assert specs["d"] == PartitionSpec("fsdp", None)
    placed = jax.device_put(state["a"], state_shardings(mesh, state)["a"])
    assert placed.addressable_shards[0].data.shape == (8, 3)
