"""What a preparation is to do, written down: the same plan goes on where an earlier process was killed."""

import dataclasses
import hashlib
import json
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxgpt
from jaxgpt.data.documents import Piece, Source
from jaxgpt.data.make_tokenizer import is_bpe, make_tokenizer
from jaxgpt.data.packages import DOCUMENTATION
from jaxgpt.data.reading import pieces as cutting
from jaxgpt.data.reading.token_files import PREFIX, token_pieces
from jaxgpt.data.report import ReadReport
from jaxgpt.data.sources import ReadOptions, open_source
from jaxgpt.data.work.work_folder import Stage, Work, place_of
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError, brief
from jaxgpt.shared.files import read_json, sha256_of, write_json

PLAN_VERSION = 1


def work_folder_of(out: Path) -> Path:
    """Return the folder that processes share while they make a data set."""
    out = out.absolute()
    return out.with_name(f".{out.name}.tmp-work")


def open_work(out: Path, plan: dict[str, Any], stages: Iterable[Stage]) -> Work:
    """Return the work folder of a plan: what a killed process left, if its plan is the same, or a new one.

    Args:
      out: the data set to make.
      plan: of `make_plan`.
      stages: of which tasks may be done.
    """
    folder = work_folder_of(out)
    if folder.exists():
        try:
            same = read_json(folder / "plan.json", "plan") == plan
        except UserError:
            same = False
        if same:
            work = Work(folder)
            work.place.mkdir(exist_ok=True)
            (work.place / "error.json").unlink(missing_ok=True)
            work.forget_cut(stages)
            done = sum(work.is_done("read", number) for number in range(len(work.units)))
            say(f"{out}: going on with what was begun, {done} of {len(work.units)} units were read")
            return work
        shutil.rmtree(folder)
    place_of(folder, plan).mkdir(parents=True)
    write_json(folder / "plan.json", plan)
    return Work(folder)


def make_plan(
    source: str,
    reading: ReadOptions,
    *,
    tokenizer: str,
    special: Sequence[str],
    val_fraction: float,
    answers_only: bool,
) -> dict[str, Any]:
    """Find the source and cut it into units; everything that decides the data set's bytes is in the plan.

    Raises:
      UserError: the source can't be read.
    """
    report = ReadReport()
    needed = source.startswith(PREFIX) or tokenizer != "gpt2"  # which is always the same
    made = make_tokenizer(tokenizer, (), special) if needed and not is_bpe(tokenizer) else None
    tokens: dict[str, int] | None = None
    if source.startswith(PREFIX):
        if made is None:
            raise UserError(
                f"--source {source} holds tokens; name the --tokenizer that made them, such as gpt2"
            )
        if answers_only:
            raise UserError(f"--answers-only needs pairs, and {source} holds tokens alone")
        _require_no_choice(source, reading)
        tokens = {"endoftext": made.endoftext, "vocab_size": made.vocab_size}
        revision, pieces = token_pieces(source, made.endoftext)
    else:
        found = _opened(source, reading, answers_only)
        revision, pieces, report = found.revision, list(found.pieces), found.report
    if not pieces:
        left_out = report.summary()
        raise UserError(
            f"source {brief(source)!r} is empty: there is nothing to read in it"
            f"{f' (left out: {left_out})' if left_out else ''}; check the path"
        )
    plan = {
        "version": PLAN_VERSION,
        "code_sha256": code_sha256(),
        "source": source,
        "revision": revision,
        "reading": jsonable(reading),
        "held_out_sha256": None if reading.held_out is None else sha256_of(reading.held_out),
        "tokenizer": tokenizer,
        "tokenizer_sha256": made.sha256 if made else None,
        "special": list(special),
        "val_fraction": val_fraction,
        "answers_only": answers_only,
        "tokens": tokens,
        "report": report.to_json(),
        "part_bytes": {"least": cutting.LEAST_BYTES, "most": cutting.MOST_BYTES},
        "units": [[dataclasses.asdict(piece) for piece in unit] for unit in units_of(pieces)],
        # Where relative paths begin: processes that join start there.
        "folder": str(Path.cwd())
        if any(_is_relative(path) for path in (source, tokenizer, str(reading.held_out)))
        else None,
        "files": sorted({(piece.path, *_state(Path(piece.path))) for piece in pieces if piece.kind != "hub"}),
    }
    return dict(json.loads(json.dumps(plan)))  # as it is read back, so that plans can be compared


def _opened(source: str, reading: ReadOptions, answers_only: bool) -> Source:
    """Return a source; UserError where the loss is to count answers, and there is documentation alone."""
    found = open_source(source, reading)
    if answers_only and found.pieces and all(piece.kind in DOCUMENTATION for piece in found.pieces):
        raise UserError(
            f"--answers-only needs pairs, and --include takes in none ({found.pieces[0].group} counts "
            "as a whole beside them); take in .py files, or leave --answers-only out"
        )
    return found


def _require_no_choice(source: str, reading: ReadOptions) -> None:
    """Raise UserError where options choose among texts, which a source of tokens does not have."""
    usual = dataclasses.asdict(ReadOptions())
    given = [
        f"--{name.replace('_', '-')}"
        for name, value in dataclasses.asdict(reading).items()
        if name != "skip_errors" and value != usual[name]
    ]
    if given:
        raise UserError(
            f"{source} holds tokens, no texts: {', '.join(given)} can choose nothing there; leave it out, or "
            "give the text that the tokens were made of"
        )


def code_sha256() -> str:
    """Return the hash of the code that makes documents and tokens: another version makes others of a text."""
    found = hashlib.sha256(platform.python_version().encode())  # whose ast writes programs
    folder = Path(jaxgpt.__file__).parent
    for path in sorted([*folder.glob("data/**/*.py"), *folder.glob("shared/**/*.py")]):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def parts_expected(work: Work) -> int:
    """Return into how many parts units will be cut, about, before anything is read."""
    sizes = [sum(piece.size for piece in unit) for unit in work.units]
    limits = work.plan["part_bytes"]
    limit = cutting.piece_bytes(sum(sizes), **limits)
    return sum(-(-size // limit) if size > limits["most"] else 1 for size in sizes)


def units_of(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Join pieces to units of about as many bytes as a piece of a large file."""
    limit = cutting.piece_bytes(sum(piece.size for piece in pieces))
    units: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not units or size + piece.size > limit or piece.kind == "hub":
            units.append([])
            size = 0
        units[-1].append(piece)
        size += piece.size
    return units


def jsonable(reading: ReadOptions) -> dict[str, Any]:
    """Return options as JSON takes them."""
    return {
        name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(reading).items()
    }


def reading_of(plan: Mapping[str, Any]) -> ReadOptions:
    """Return the options of a plan."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in plan["reading"].items()
    }
    held_out = values["held_out"]
    return ReadOptions(**values | {"held_out": None if held_out is None else Path(held_out)})


def _is_relative(name: str) -> bool:
    """Whether a source or a tokenizer is a path that depends on where a process runs."""
    if name.startswith("packages:"):  # no path, and with many packages too long for one
        return False
    path = Path(name.removeprefix(PREFIX))
    return path.exists() and not path.is_absolute()


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
