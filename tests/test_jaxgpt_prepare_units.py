"""A source that is cut into units gives the data set of one read whole, whoever does the work."""

import errno
import gzip
import json
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import Command, assert_one_line_error, python, rows, write_jsonl
from waiting import killed_at_end, wait_until

from jaxgpt.data.reading import pieces
from jaxgpt.data.stages import duplicates, finish, overlap, read, shards, vocabulary
from jaxgpt.data.stages.order import STAGES
from jaxgpt.data.stages.read import READ
from jaxgpt.data.work.work_folder import KeptError, Stage, Work
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError

UNIT_BYTES = 20_000
TEMPLATE = ("--template", "{instruction} {input} {output}")
OPTIONS = ("--tokenizer", "bpe:384", "--val-fraction", 0.1, *TEMPLATE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of several units; some again in later units, some of validation with 50 tokens of training."""
    made = rows(200)
    long = [
        {**row, "output": " ".join(each["output"] for each in made[:3]) + row["input"]} for row in made[3:40]
    ]
    return write_jsonl(tmp_path_factory.mktemp("source") / "rows.jsonl", [*made, *long, *made[50:90]])


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of that source, read as one unit into one file."""
    from conftest import run_command

    out = tmp_path_factory.mktemp("whole") / "d"
    assert run_command("jaxgpt", "prepare", "--source", source, *OPTIONS, "--answers-only", "--out", out) == 0
    return out


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LEAST_BYTES", UNIT_BYTES)
    monkeypatch.setattr(finish, "ONE_FILE_BYTES", 0)


def assert_same(found: Path, whole: Path) -> None:
    """The shards are the one file, cut; all else is the same."""
    cut, one = open_dataset(found), open_dataset(whole)
    assert cut.manifest["shards"] > 5
    assert (np.asarray(cut.train) == one.train).all()
    assert (cut.val == one.val).all()
    assert cut.manifest["counts"] == one.manifest["counts"]
    counts = cut.manifest["counts"]
    assert counts["duplicates"] == 40
    assert counts["val_overlapping"] > 0
    assert cut.tokenizer_sha256 == one.tokenizer_sha256
    assert cut.train_mask is not None
    assert one.train_mask is not None
    expected = np.unpackbits(np.asarray(one.train_mask), bitorder="little")[: len(one.train)]
    assert (cut.train_mask.counted(0, len(one.train)) == expected).all()  # type: ignore[union-attr]
    assert (np.asarray(cut.val_mask) == one.val_mask).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_units_give_the_stream_of_one_file(
    command: Command, source: Path, whole: Path, tmp_path: Path, small_units: None, workers: int
) -> None:
    call = ("jaxgpt", "prepare", "--source", source, *OPTIONS, "--answers-only", "--workers", workers)
    code, _, err = command(*call, "--out", tmp_path / "d")
    assert code == 0, err
    assert_same(tmp_path / "d", whole)
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_one_file_that_can_not_be_entered_in_the_middle_is_cut_when_it_is_read(
    command: Command,
    source: Path,
    whole: Path,
    tmp_path: Path,
    small_units: None,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    monkeypatch.setattr(pieces, "LEAST_BYTES", UNIT_BYTES // 2)
    monkeypatch.setattr(pieces, "MOST_BYTES", UNIT_BYTES)
    packed = tmp_path / "in" / "rows.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(source.read_bytes()))
    call = ("jaxgpt", "prepare", "--source", packed, *OPTIONS, "--answers-only", "--workers", workers)
    started: list[object] = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or start(*a, **k))
    code, _, err = command(*call, "--out", tmp_path / "d")
    assert code == 0, err
    assert len(started) == (workers if workers > 1 else 0)
    assert_same(tmp_path / "d", whole)
    files = open_dataset(tmp_path / "d").manifest["files"]
    sizes = [files[name]["bytes"] for name in files if re.fullmatch(r"train-\d+.bin", name)]
    assert len(sizes) > 5
    assert max(sizes) < 2 * sum(sizes) / len(sizes)


def test_hashes_that_are_sorted_in_parts_find_the_same(
    command: Command,
    source: Path,
    whole: Path,
    tmp_path: Path,
    small_units: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(read, "PART_DOCUMENTS", 30)
    monkeypatch.setattr(overlap, "PART_HASHES", 500)
    parts: list[int] = []
    find = duplicates.duplicate_parts
    monkeypatch.setattr(duplicates, "duplicate_parts", lambda work: parts.append(find(work)) or parts[-1])
    call = ("jaxgpt", "prepare", "--source", source, *OPTIONS, "--answers-only", "--workers", 1)
    assert command(*call, "--out", tmp_path / "d")[0] == 0
    assert parts[-1] == 16
    assert_same(tmp_path / "d", whole)


def test_an_interrupted_preparation_goes_on_where_it_was(
    command: Command,
    source: Path,
    whole: Path,
    tmp_path: Path,
    small_units: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_pieces: list[int] = []
    read_piece = read.read_piece

    def interrupted(piece: pieces.Piece, *more: object) -> Iterator[object]:
        read_pieces.append(piece.begin)
        if len(read_pieces) == 4:
            raise KeyboardInterrupt
        return read_piece(piece, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(read, "read_piece", interrupted)
    call = ("jaxgpt", "prepare", "--source", source, *OPTIONS, "--answers-only", "--workers", 1)
    assert command(*call, "--out", tmp_path / "d")[0] == 130
    assert not (tmp_path / "d").exists()
    (Work(tmp_path / ".d.tmp-work").path("read", 1, ".text")).write_bytes(
        b""
    )  # lost when the machine stopped
    code, _, err = command(*call, "--out", tmp_path / "d")
    assert code == 0
    assert "going on with what was begun, 2 of" in err
    assert len(read_pieces) == 2 + len(set(read_pieces))
    assert_same(tmp_path / "d", whole)


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more; without a parent it may stay a zombie, where no init takes it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_preparation_takes_its_workers_along_and_goes_on(
    command: Command, source: Path, whole: Path, tmp_path: Path, small_units: None
) -> None:
    out = tmp_path / "d"
    call = ["prepare", "--source", source, *OPTIONS, "--answers-only", "--workers", 2, "--out", out]
    code = (
        "import jaxgpt.data.reading.pieces as pieces; from jaxgpt.cli import main; "
        f"pieces.LEAST_BYTES = {UNIT_BYTES}; main({[str(each) for each in call]!r})"
    )
    arguments, environment = python(code)
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    work = tmp_path / ".d.tmp-work"
    with killed_at_end(process):
        wait_until(
            lambda: any(work.glob("*/read/00000.json")) or process.poll() is not None, "the first unit"
        )
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
    wait_until(lambda: all(map(has_ended, workers)), "the end of the workers")
    assert not any(work.glob(f"*/{STAGES[-1].name}/*.json"))  # the work did not end them
    assert not out.exists()
    assert command("jaxgpt", *call)[0] == 0
    assert_same(out, whole)


def assert_goes_on(command: Command, call: tuple[object, ...], whole: Path) -> None:
    """The command, whose last word is --out's, goes on where it was."""
    code, _, err = command("jaxgpt", *call)
    assert code == 0
    assert "going on with what was begun" in err
    assert_same(Path(str(call[-1])), whole)


def test_a_killed_worker_leaves_what_is_done(
    command: Command,
    source: Path,
    whole: Path,
    tmp_path: Path,
    small_units: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jaxgpt.data.work import crew

    out = tmp_path / "d"
    call = ("prepare", "--source", source, *OPTIONS, "--answers-only", "--workers", 2, "--out", out)
    with monkeypatch.context() as killing:
        wait = crew.Crew._wait_for

        def killed(self: crew.Crew, stage: Stage) -> None:
            units = range(len(self._work.units))
            wait_until(lambda: any(self._work.is_done("read", each) for each in units), "a unit", every=0.001)
            for process in self._processes:
                process.kill()
                process.wait()
            wait(self, stage)

        killing.setattr(crew.Crew, "_wait_for", killed)
        code, _, err = command("jaxgpt", *call)
    assert code == 2
    assert "what is done is kept" in err.splitlines()[-1]
    assert not out.exists()
    assert_goes_on(command, call, whole)


def test_a_full_disk_leaves_what_is_done(
    command: Command,
    source: Path,
    whole: Path,
    tmp_path: Path,
    small_units: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "d"
    call = ("prepare", "--source", source, *OPTIONS, "--answers-only", "--workers", 1, "--out", out)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "shard")

    with monkeypatch.context() as filling:
        filling.setattr(shards, "encode", full)
        code, _, err = command("jaxgpt", *call)
    assert code == 2
    assert "free some space" in err.splitlines()[-1]
    assert not out.exists()
    assert len(list((tmp_path / ".d.tmp-work").glob("*/read/*.text"))) > 5
    assert_goes_on(command, call, whole)


def test_what_the_system_refuses_a_worker_ends_all_and_what_they_had_begun_is_written_anew(
    command: Command, source: Path, whole: Path, tmp_path: Path, small_units: None
) -> None:
    out = tmp_path / "d"
    call = ("prepare", "--source", source, *OPTIONS, "--answers-only", "--workers", 2, "--out", out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))  # bytes of a file, less than a unit
    try:
        code, _, err = command("jaxgpt", *call)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "File too large" in err.splitlines()[-1]
    assert "what is done is kept in" in err.splitlines()[-1]
    work = Work(tmp_path / ".d.tmp-work")
    left = work.place / "read" / ".00000.text.tmp-99999999"  # of a worker that was killed
    left.write_text("half")
    work.path("read", 0, ".json").unlink(missing_ok=True)
    (work.place / "error.json").unlink()
    assert work._do(READ, 0)
    assert not left.exists()
    assert_goes_on(command, call, whole)


def test_what_the_system_refuses_a_worker_is_said_and_what_is_done_is_kept(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    refused, damaged = Work(tmp_path), UserError("line 3 is no JSON")
    refused.place.mkdir()
    refused.fail(OSError(errno.ENOSPC, "full"), "shard: full; free some space")
    with pytest.raises(KeptError, match=r"^shard: full; free some space; what is done is kept in /"):
        refused.raise_failure()
    refused.fail(damaged, str(damaged))  # the first reason stays
    with pytest.raises(KeptError):
        refused.raise_failure()
    (refused.place / "error.json").unlink()
    refused.fail(damaged, str(damaged))
    with pytest.raises(UserError, match=r"^line 3 is no JSON$") as raised:
        refused.raise_failure()
    assert not isinstance(raised.value, KeptError)


def test_another_process_may_join(
    command: Command,
    source: Path,
    whole: Path,
    tmp_path: Path,
    small_units: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jaxgpt.data import prepare

    out = tmp_path / "d"
    call = ("jaxgpt", "prepare", "--source", source, *OPTIONS, "--answers-only", "--workers", 1, "--out", out)
    join = ("jaxgpt", "prepare", "--out", out, "--join", "--workers", 1)
    assert_one_line_error(command(*join), "nobody prepares", "--join")
    with monkeypatch.context() as broken:
        broken.setattr(prepare, "STAGES", prepare.STAGES[:1])  # it is gone when all is read
        broken.setattr(prepare, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(*call)[0] == 130
    code, printed, err = command(*join, "--json")
    assert code == 0, err
    assert json.loads(printed)["units"] > 5
    assert not out.exists()
    with monkeypatch.context() as done:
        done.setattr(vocabulary, "make_tokenizer", None)  # all that is left is to write the data set
        assert command(*call)[0] == 0
    assert_same(out, whole)


def test_another_version_of_the_code_begins_anew_and_does_not_join(
    command: Command,
    source: Path,
    whole: Path,
    tmp_path: Path,
    small_units: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jaxgpt.data import prepare
    from jaxgpt.data.work import plan

    real = plan.code_sha256()
    for file in ("data/sources.py", "shared/tokenizer/__init__.py", "shared/dataset/shards.py"):
        with monkeypatch.context() as changed:
            read_bytes = Path.read_bytes
            changed.setattr(
                Path,
                "read_bytes",
                lambda path: read_bytes(path) + b"#" * path.as_posix().endswith(file),  # noqa: B023
            )
            assert plan.code_sha256() != real, file
    out = tmp_path / "d"
    call = ("jaxgpt", "prepare", "--source", source, *OPTIONS, "--answers-only", "--workers", 1, "--out", out)
    with monkeypatch.context() as broken:
        broken.setattr(prepare, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(*call)[0] == 130
    monkeypatch.setattr(plan, "code_sha256", lambda: "of another version")
    monkeypatch.setattr(prepare, "code_sha256", lambda: "of another version")
    join = ("jaxgpt", "prepare", "--out", out, "--join", "--workers", 1)
    assert_one_line_error(command(*join), "another version of jaxgpt", "install the same")
    code, _, err = command(*call)
    assert code == 0
    assert "going on" not in err
    assert_same(out, whole)


def test_a_damaged_line_of_a_late_unit_is_one_line_with_its_number(
    command: Command, source: Path, tmp_path: Path, small_units: None
) -> None:
    lines = source.read_text().splitlines(keepends=True)
    lines[230] = '{"text": "cut\n'
    (tmp_path / "a.jsonl").write_text("".join(lines))
    call = ("jaxgpt", "prepare", "--source", tmp_path / "a.jsonl", *OPTIONS, "--workers", 2)
    assert_one_line_error(command(*call, "--out", tmp_path / "d"), "line 231", "--skip-errors")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_bpe_is_trained_on_a_bounded_sample_and_that_is_said(
    command: Command, source: Path, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "BPE_BYTES", 10_000)
    call = ("jaxgpt", "prepare", "--source", source, *OPTIONS, "--workers", 1, "--out", tmp_path / "d")
    code, printed, err = command(*call, "--json")
    assert code == 0, err
    trained_on = json.loads(printed)["tokenizer"]["trained_on"]
    assert 5_000 < trained_on["bytes"] <= 10_000 < trained_on["of_bytes"]
    assert f"bpe:384: trained on {trained_on['documents']} documents chosen by their hashes" in err


def test_workers_import_nothing_of_the_folder_they_start_in(
    command: Command, source: Path, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit(7)")
    (tmp_path / "rows.jsonl").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    call = ("prepare", "--source", "rows.jsonl", *OPTIONS, "--answers-only", "--workers", 2, "--out", "d")
    code, _, err = command("jaxgpt", *call)
    assert code == 0, err
