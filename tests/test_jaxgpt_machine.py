"""What this machine gives a process, read from folders that a test makes."""

from pathlib import Path

from jaxgpt.shared.machine import control_group_free_bytes, leave_out_settings, system_free_bytes


def test_cached_files_of_a_control_group_count_as_free(tmp_path: Path) -> None:
    assert control_group_free_bytes(tmp_path) is None  # no control group
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    assert control_group_free_bytes(tmp_path) is None  # no limit
    (tmp_path / "memory.max").write_text("1000\n")
    assert control_group_free_bytes(tmp_path) == 1000 - 700 + 150


def test_the_system_has_memory_left() -> None:
    free = system_free_bytes()
    assert free is None or free > 1e6


def test_another_random_generator_of_the_shell_is_left_out() -> None:
    """Its keys have another shape than those that checkpoints hold."""
    environment = {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_PLATFORMS": "cpu"}
    leave_out_settings(environment)
    assert environment == {"JAX_PLATFORMS": "cpu"}
