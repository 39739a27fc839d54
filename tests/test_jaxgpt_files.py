import errno
import fcntl
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import python

from jaxgpt.shared.errors import UserError, system_error_line
from jaxgpt.shared.files import (
    as_path,
    check_output_folder,
    check_replaceable,
    check_writable,
    new_file,
    new_folder,
    only_writer,
    prepare_output_file,
    read_json,
    write_atomic,
    write_json,
)
from jaxgpt.shared.locks import is_locked, lock, wait_for_lock


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on the device, it takes 4 bytes") as raised:
        write_atomic(path, "half")
    assert raised.value.filename == str(path)
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_nan_is_never_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(target, False, "manifest.json") as folder:  # noqa: PT012
        (folder / "manifest.json").write_text("{}")
        assert not target.exists()
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with new_folder(target, False, "manifest.json") as folder:
        (folder / "manifest.json").write_text("{}")
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_folder_is_replaced_only_on_request_and_only_if_it_is_ours(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with (
            pytest.raises(UserError, match="choose another --out"),
            new_folder(target, overwrite, "manifest.json"),
        ):
            pass
    assert (target / "thesis.txt").read_text() == "mine"


def test_a_killed_writer_leaves_only_a_hidden_folder_that_the_next_run_removes(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from jaxgpt.shared.files import new_folder\n"
        f"with new_folder(Path({str(tmp_path / 'out')!r}), False, 'm') as folder:\n"
        "    (folder / 'm').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    arguments, environment = python(code)
    assert subprocess.run(arguments, env=environment, check=False).returncode == -9
    (leftover,) = os.listdir(tmp_path)
    assert leftover.startswith(".out.tmp-")
    with new_folder(tmp_path / "out", False, "m") as folder:
        (folder / "m").write_text("whole")
    assert os.listdir(tmp_path) == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    old = tmp_path / f".out.tmp-{gone.pid}-old"
    old.mkdir()
    (old / "m").write_text("the only copy")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", True, "m"):
        raise RuntimeError
    assert (tmp_path / "out" / "m").read_text() == "the only copy"


def test_an_output_is_refused_before_any_work_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    refusals = {
        tmp_path / "file" / "out": "can't be written: Not a directory",
        tmp_path / "link": "is a symbolic link, which would be replaced; give nowhere",
        Path("/proc/none/out"): r"can't be written: No such file or directory \(/proc/none\)",
        tmp_path / ("x" * 300): "can't be written: File name too long",
        Path("/proc"): "is a mount point",
    }
    for target, message in refusals.items():
        with pytest.raises(UserError, match=message):
            check_writable(target)
    check_writable(tmp_path / "new" / "deep" / "out")
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
    prepare_output_file(tmp_path / "new" / "a.json")
    assert os.listdir(tmp_path / "new") == []
    with pytest.raises(UserError, match="is a folder, expected a file"):
        prepare_output_file(tmp_path / "new")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        check_output_folder(tmp_path / "file")
    (tmp_path / "linked").symlink_to("new")
    check_output_folder(tmp_path / "linked")  # is written into, not replaced
    check_output_folder(tmp_path / "another" / "one")
    assert not (tmp_path / "another").exists()
    assert os.listdir(tmp_path / "new") == []


def test_processes_that_try_the_same_new_folder_do_not_refuse_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sees the folder above that another made to try, and that is removed before it makes its own."""
    above, mkdir, seen = tmp_path / "runs", Path.mkdir, []

    def while_another_ends(self: Path, *arguments: Any, **more: Any) -> None:
        if not seen:
            above.rmdir()
        seen.append(self)
        mkdir(self, *arguments, **more)

    above.mkdir()
    monkeypatch.setattr(Path, "mkdir", while_another_ends)
    check_output_folder(above / "mine")
    assert len(seen) == 3  # the second time with the folder above
    assert not above.exists()


def test_a_full_device_is_an_error_of_the_system_with_path_and_bytes(tmp_path: Path) -> None:
    def file(error: Exception) -> None:
        with new_file(tmp_path / "a") as path:
            path.write_bytes(b"1234567")
            raise error

    def folder(error: Exception) -> None:
        with new_folder(tmp_path / "a", False, "m") as path:
            (path / "deep").mkdir()
            (path / "deep" / "m").write_bytes(b"1234567")
            raise error

    library = RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
    expected = f"{tmp_path / 'a'}: no space left on the device after 7 bytes of it; free some space"
    for error in (OSError(errno.ENOSPC, "No space left on device"), library):
        for write in (file, folder):
            with pytest.raises(OSError, match="after 7 bytes of it") as raised:
                write(error)
            assert system_error_line(raised.value).startswith(expected)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_damaged_json_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        read_json(path, "configuration")


def test_nothing_that_is_read_and_no_folder_of_others_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "art"
    (target / "run").mkdir(parents=True)
    (target / "certificate.json").write_text("{}")
    with pytest.raises(UserError, match="which is read"):
        check_replaceable(target, True, "certificate.json", [target / "run"])
    with pytest.raises(UserError, match="which is read"):
        check_replaceable(target, True, "certificate.json", [target])
    with pytest.raises(UserError, match=r"folders of something else \(run\)"):
        check_replaceable(target, True, "certificate.json", [tmp_path / "other"])
    (target / "run").rmdir()
    (target / "notes.txt").touch()
    with pytest.raises(UserError, match=r"files of something else \(notes.txt\)"):
        check_replaceable(target, True, "certificate.json", [tmp_path / "other"])
    (target / "notes.txt").unlink()
    check_replaceable(target, True, "certificate.json", [tmp_path / "other"])


def test_a_lock_is_held_until_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with lock(path, "busy here"), pytest.raises(UserError, match="busy here"), lock(path, "busy here"):
        raise AssertionError("a second one took it")
    with lock(path, "busy here"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_work_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """Lustre without flock, NFS without its lock service: nobody else is there for all that is known."""
    path = tmp_path / ".lock"

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("jaxgpt.shared.locks.fcntl.flock", flock)
    assert not is_locked(path)
    for held in (lock(path, "busy here"), wait_for_lock(path, lambda: None)):
        with held:
            assert is_locked(path)  # for all that is known: what others write is not removed
    lines = capfd.readouterr().err.replace("\n", " ").split("WARNING")[1:]
    assert len(lines) == 2
    assert all(f"locks no files ({os.strerror(number)})" in line for line in lines)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_holds_is_told_by_both_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / ".lock"
    path.touch()

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("jaxgpt.shared.locks.fcntl.flock", flock)
    with pytest.raises(UserError, match="busy here"), lock(path, "busy here"):
        raise AssertionError("it was taken")
    assert is_locked(path)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last holder removes the file between our opening and our locking it."""
    path, flock, held = tmp_path / ".lock", fcntl.flock, []

    def remove_first(file: Any, how: int) -> None:
        if not held:
            path.unlink()
        held.append(1)
        flock(file, how)

    monkeypatch.setattr("jaxgpt.shared.locks.fcntl.flock", remove_first)
    with lock(path, "busy here"):
        assert len(held) == 2
        assert path.exists()


def test_who_waits_for_a_lock_takes_it_anew_where_its_holder_removed_the_folder(tmp_path: Path) -> None:
    path, waited, held = tmp_path / "folder" / ".lock", threading.Event(), []

    def wait() -> None:
        with wait_for_lock(path, waited.set):
            held.append(path.exists())

    with wait_for_lock(path, lambda: None):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waited.wait(60)
        shutil.rmtree(path.parent)
    thread.join(60)
    assert held == [True]


def test_what_the_holder_of_a_lock_writes_is_no_leftover_whatever_its_process_s_number(
    tmp_path: Path,
) -> None:
    """In another container its number is nobody's here, or ours."""
    target = tmp_path / "out"
    gone = subprocess.Popen(["true"])
    gone.wait()
    with only_writer(target):
        for pid in (gone.pid, os.getpid()):
            (tmp_path / f".out.tmp-{pid}").mkdir()
        with pytest.raises(UserError, match="another process writes"), only_writer(target):
            pass
        check_replaceable(target, True, "m")
        assert len(list(tmp_path.glob(".out.tmp-[0-9]*"))) == 2
    check_replaceable(target, True, "m")
    assert not list(tmp_path.glob(".out.tmp-*"))


def test_leftovers_are_those_of_the_very_name(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    other, own = tmp_path / f".model1.tmp-{gone.pid}-old", tmp_path / f".model[1].tmp-{gone.pid}"
    other.mkdir()
    own.mkdir()
    check_replaceable(tmp_path / "model[1]", True, "m")
    assert other.exists()
    assert not own.exists()


def test_tensors_that_the_system_cannot_write_are_an_error_of_the_system_with_their_path(
    tmp_path: Path,
) -> None:
    code = f"""
import resource, numpy as np
from pathlib import Path
from jaxgpt.shared.tensor_file import write_tensor_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_tensor_file(Path({str(tmp_path / "a.safetensors")!r}), {{"a": np.zeros(10_000)}})
except OSError as error:
    print(error.errno, error.filename)
"""
    line, environment = python(code)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), str(tmp_path / "a.safetensors")]


@pytest.mark.parametrize(
    ("out", "parts"),
    [
        ("gs://bucket/run", ("--out gs://bucket/run is an address", "mount it")),
        ("s3://bucket/run", ("--out s3://bucket/run is an address",)),
        ("{}/file", ("/file is a file, expected a folder",)),
        ("{}/file/run", ("/file is a file, expected a folder",)),
        ("{}/link", ("/link is a link to nowhere (gone)",)),
        ("{}/link/run", ("/link is a link to nowhere (gone)",)),
        ("/proc/run", ("--out /proc/run can't be written", "choose another --out")),
        ("{}/" + "x" * 300, ("can't be written: File name too long",)),
        ("{}/a\0b", ("can't be written", "null")),
    ],
)
def test_where_no_folder_can_be_made_is_told_in_a_line(
    tmp_path: Path, out: str, parts: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(UserError) as raised:
        check_output_folder(Path(out.format(tmp_path)))
    for part in parts:
        assert part in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_where_a_folder_can_be_made_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    for name in ("there", "link", "there/a/b", "gs:"):
        check_output_folder(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]
    assert os.listdir(tmp_path / "there") == []


def test_a_path_may_be_given_as_text_and_not_as_anything_else() -> None:
    assert as_path("a/b", "folder") == as_path(Path("a/b"), "folder") == Path("a/b")
    with pytest.raises(UserError, match="folder is None, expected a path"):
        as_path(None, "folder")
