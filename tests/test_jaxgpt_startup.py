"""What a training does before its first step: the platform it expects, programs that are kept on disk."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import Command, assert_one_line_error, python
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.machine import schedulable_cores
from jaxgpt.training.devices.compilation_cache import LIMITS, UNBOUNDED, compilation_cache
from jaxgpt.training.devices.platform import expected_platform, installed_plugins

CUDA, NVIDIA = ("xla_cuda12",), ("nvidiactl", "nvidia0")


@pytest.mark.parametrize(
    ("wanted", "plugins", "devices", "environment", "platform"),
    [
        (None, (), (), {}, "cpu"),
        (None, CUDA, NVIDIA, {}, "gpu"),
        ("", ("xla_cuda13",), ("nvidiactl",), {}, "gpu"),  # in a container
        ("", CUDA, ("dxg",), {}, "gpu"),  # WSL2
        (None, CUDA, (), {}, "cpu"),  # JAX's CUDA build on a machine without a GPU
        (None, (), NVIDIA, {}, "cpu"),  # JAX's CPU build on one with a GPU
        (None, CUDA, NVIDIA, {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        (None, CUDA, NVIDIA, {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        (None, CUDA, NVIDIA, {"CUDA_VISIBLE_DEVICES": "2,3"}, "gpu"),
        ("cpu", CUDA, NVIDIA, {}, "cpu"),
        ("cpu,cuda", CUDA, NVIDIA, {}, "cpu"),
        ("cuda,cpu", CUDA, NVIDIA, {}, "gpu"),
        ("cuda,cpu", CUDA, (), {}, "cpu"),
        ("GPU", CUDA, NVIDIA, {}, "gpu"),
        ("gpu, cpu", (), NVIDIA, {}, "cpu"),
        (None, ("xla_rocm7",), ("kfd",), {}, "gpu"),
        (None, ("xla_rocm7",), NVIDIA, {}, "cpu"),
        ("rocm,cpu", ("xla_rocm7",), ("kfd",), {"CUDA_VISIBLE_DEVICES": "-1"}, "gpu"),
        (None, ("libtpu",), ("vfio/0",), {}, "tpu"),
        ("tpu,cpu", ("libtpu",), ("accel0",), {}, "tpu"),
        (None, ("libtpu",), (), {}, "cpu"),
        ("metal", (), (), {}, "metal"),
    ],
)
def test_the_platform_follows_from_what_is_asked_for_and_what_is_there(
    wanted: str | None,
    plugins: tuple[str, ...],
    devices: tuple[str, ...],
    environment: dict[str, str],
    platform: str,
    tmp_path: Path,
) -> None:
    for device in devices:
        path = tmp_path / "dev" / device
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert expected_platform(wanted, plugins=plugins, environment=environment, root=tmp_path) == platform


def test_what_is_expected_of_this_machine_is_what_jax_took() -> None:
    assert expected_platform(jax.config.jax_platforms) == jax.default_backend()


def test_plugins_are_found_where_jax_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jax_plugins" / "xla_cuda12").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "xla_cuda12" / "__init__.py").touch()
    (tmp_path / "other-1.0.dist-info").mkdir()
    (tmp_path / "other-1.0.dist-info" / "METADATA").write_text("Name: other\nVersion: 1.0\n")
    points = "[jax_plugins]\nother = somewhere.jax_rocm7_plugin\n"
    (tmp_path / "other-1.0.dist-info" / "entry_points.txt").write_text(points)
    before = installed_plugins()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_plugins() == before | {"xla_cuda12", "jax_rocm7_plugin"}


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_freed_memory_is_kept_on_a_cpu_alone(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    kept: list[object] = []
    monkeypatch.setattr("jaxgpt.training.devices.platform.expected_platform", lambda wanted: platform)
    monkeypatch.setattr("jaxgpt.training.devices.malloc.keep_freed_memory", lambda *given: kept.append(given))
    arguments = ("tiny", "--data", data, "--out", tmp_path / "run", "--process-count", 2)
    assert_one_line_error(command("jaxgpt", "train", *arguments), "--coordinator")  # which comes next
    assert len(kept) == (platform == "cpu")


def test_a_training_does_not_load_pytorch() -> None:
    line, environment = python("import jaxgpt.training.trainer, sys; sys.exit('torch' in sys.modules)")
    assert subprocess.run(line, env=environment, check=False).returncode == 0


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX as a user has it who told it nothing; even what compiles at once is kept."""
    own = jax.config.jax_compilation_cache_dir
    for name in LIMITS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setitem(LIMITS, "jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", own)
    reset_cache()


def compile_and_count_hits() -> tuple[jax.Array, int]:
    """Compile a function anew; return what it computes, and how many programs came from the cache."""
    hits: list[str] = []

    def note(event: str, **_: object) -> None:
        hits.extend([event] * (event == "/jax/compilation_cache/cache_hits"))

    jax.monitoring.register_event_listener(note)
    try:
        compiled = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x)).lower(jnp.ones((7, 7))).compile()
    finally:
        jax.monitoring.unregister_event_listener(note)
    return compiled(jnp.ones((7, 7))), len(hits)


def programs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*-cache"))


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("where", ["auto", "given"])
def test_a_program_is_taken_from_the_last_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "home"))
    folder = tmp_path / ("home/compiled" if where == "auto" else "given")
    where = "auto" if where == "auto" else str(folder)
    with compilation_cache(where):
        first, hits = compile_and_count_hits()
    assert hits == 0
    kept = programs(folder)
    assert [path.parent for path in kept] == [folder / f"cpu-{schedulable_cores()}-cores"] * len(kept)
    assert kept
    with compilation_cache(where):
        second, hits = compile_and_count_hits()
    assert hits == 1
    assert (first == second).all()
    assert programs(folder) == kept
    assert compile_and_count_hits()[1] == 0  # JAX is as it was


@pytest.mark.usefixtures("no_cache")
def test_half_written_programs_are_removed_and_compiled_again(tmp_path: Path) -> None:
    with compilation_cache(str(tmp_path)):
        compile_and_count_hits()
    whole = programs(tmp_path)
    for path in whole:  # as a kill in the middle of writing leaves them
        path.write_bytes(path.read_bytes()[:100])
        path.with_name(path.name.removesuffix("-cache") + "-atime").unlink()
    with compilation_cache(str(tmp_path)):
        assert programs(tmp_path) == []
        assert compile_and_count_hits()[1] == 0
    with compilation_cache(str(tmp_path)):
        assert programs(tmp_path) == whole
        assert compile_and_count_hits()[1] == 1


@pytest.mark.usefixtures("no_cache")
def test_nothing_is_kept_with_none_nor_by_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path))
    with compilation_cache("none"):
        compile_and_count_hits()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with compilation_cache():
        compile_and_count_hits()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_cache")
def test_several_processes_read_what_all_see_without_a_lock_and_throw_nothing_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with compilation_cache(str(tmp_path)):
        assert compile_and_count_hits()[1] == 0
    alone = programs(tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for hits in (0, 1):
        with compilation_cache(str(tmp_path)):
            assert jax.config.values["jax_compilation_cache_max_size"] == UNBOUNDED
            assert compile_and_count_hits()[1] == hits
    kept = [path for path in programs(tmp_path) if path not in alone]
    assert kept
    assert {path.parent.name for path in kept} == {f"cpu-{schedulable_cores()}-cores-2-processes"}
    assert not list(kept[0].parent.glob("*-atime"))
    assert not (kept[0].parent / ".lockfile").exists()


@pytest.mark.usefixtures("no_cache")
def test_what_jax_was_told_is_left_aside_where_processes_on_gpus_may_find_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with compilation_cache():
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert not capsys.readouterr().err
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with compilation_cache():
        assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"{tmp_path} is left aside")
    assert "--compilation-cache DIR" in said


def test_what_a_user_told_jax_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "home"))
    own = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    try:
        with compilation_cache():
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
        with compilation_cache("none"):
            assert jax.config.jax_compilation_cache_dir is None
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    finally:
        jax.config.update("jax_compilation_cache_dir", own)
        reset_cache()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_cache")
def test_a_folder_that_can_not_be_made_is_one_line_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "file"))
    with compilation_cache():
        assert compile_and_count_hits()[1] == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compiled programs are not kept: {tmp_path / 'file'}")
    assert "--compilation-cache DIR" in line
    with pytest.raises(UserError, match=r"--compilation-cache .*file/x: nothing can be kept there"):
        compilation_cache(str(tmp_path / "file" / "x")).__enter__()
