"""A model of the hub by its name: downloaded, converted, certified and quantized once, then kept.

    LLM.load("openai-community/gpt2", method="int8-dynamic")

What is kept lies in the user's cache folder (JAXGPT_CACHE, else ~/.cache/jaxgpt):

    models/ORGANIZATION--NAME/COMMIT/METHOD/   the artifact
    models/ORGANIZATION--NAME/refs/REVISION    the commit that a branch or tag was when it was last asked for
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_atomic
from jaxgpt.shared.locks import wait_for_lock
from jaxgpt.shared.machine import user_cache_folder

from jaxgpt_export.format.artifact import read_certified_artifact
from jaxgpt_export.format.generation_config import read_generation_config
from jaxgpt_export.interchange.hub import COMMIT, NAME, PREFIX, fetch, parse_name

DEFAULT_METHOD = "int8-dynamic"
FLOAT = "fp32"
METHODS = (FLOAT, DEFAULT_METHOD, "int8-weight-only")  # the others need text: `jaxgpt-export quantize --data`


def names_hub_model(source: str) -> bool:
    """Whether a source is a model of the hub: hub:NAME, or ORGANIZATION/NAME where no such folder is."""
    if source.startswith(PREFIX):
        return True
    name = source.partition("@")[0]
    return name.count("/") == 1 and bool(NAME.fullmatch(name)) and not os.path.exists(source)


def load_pretrained(source: str, method: str = DEFAULT_METHOD, refresh: bool = False) -> Path:
    """Return the artifact folder of a model of the hub; it is made when it is not in the cache.

    Args:
      source: [hub:]ORGANIZATION/NAME[@REVISION].
      method: one of METHODS.
      refresh: ask the hub which commit the revision is now, instead of taking the one that is known.

    Raises:
      UserError: no such model or method, a hub that can't be reached, a folder that can't be written; nothing
        half-made is left.
    """
    name, revision = parse_name(source)
    if method not in METHODS:
        raise UserError(
            f"method {method!r} is none of {', '.join(METHODS)}, which need no text; for others: "
            f"jaxgpt-export import-hf --source {PREFIX}{name}, then jaxgpt-export quantize with --data"
        )
    home = user_cache_folder() / "models" / name.replace("/", "--")
    known = None if refresh else _known(home, revision, method)
    if known is not None:
        return known
    with (
        _saying_where(home),
        _saying_that_no_folder_is_here(source),
        _saying_what_is_missing(source),
        wait_for_lock(home / ".lock", lambda: say(f"another process is loading {name}; waiting for it")),
    ):
        (home / "refs").mkdir(exist_ok=True)
        try:
            known = None if refresh else _known(home, revision, method)
            return _make(home, name, revision, method) if known is None else known
        except BaseException:
            _remove_empty(home)
            raise


def _known(home: Path, revision: str, method: str) -> Path | None:
    """Return the artifact of a revision that was loaded before; None without one."""
    commit = _last_commit(home, revision)
    if commit is None:
        return None
    folder = home / commit / method
    return folder if (folder / "certificate.json").is_file() else None


def _last_commit(home: Path, revision: str) -> str | None:
    """Return the commit that a revision was when it was last asked for; None if it never was."""
    if COMMIT.fullmatch(revision):
        return revision
    ref = home / "refs" / quote(revision, safe="")
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else None


def _make(home: Path, name: str, revision: str, method: str) -> Path:
    """Download, convert and quantize; return the artifact's folder."""
    from jaxgpt_export.interchange.import_hf import import_folder
    from jaxgpt_export.quantize.command import QuantizeOptions, quantize

    for leftover in home.glob(".tmp-*"):  # of a process that was killed: only who holds the lock makes one
        shutil.rmtree(leftover, ignore_errors=True)
    model, source = fetch(name, revision, _last_commit(home, revision))
    folder = home / model.commit / method
    if not _is_whole(folder, source):
        if not (folder / "certificate.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=home) as scratch:
            out = folder if method == FLOAT else Path(scratch) / FLOAT
            done = import_folder(source, out, overwrite=True, hub=model)  # one that is there stays until then
            if done.passed and method != FLOAT:
                done = quantize(QuantizeOptions(artifact=out, method=method, out=folder, overwrite=True))
        if not done.passed:
            raise UserError(f"{name} was not loaded: what this program computes of it differs (see above)")
    write_atomic(home / "refs" / quote(revision, safe=""), model.commit + "\n")
    return folder


def _is_whole(folder: Path, source: Path) -> bool:
    """Whether an artifact is there and is what would be made of its source; says so where it is not."""
    if not (folder / "certificate.json").is_file():
        return False
    try:
        if read_certified_artifact(folder).generation != read_generation_config(source):
            raise UserError("it does not say how its tokens are drawn, as the model does")
    except UserError as error:
        say(f"{folder} is made again: {error}")
        return False
    return True


def _remove_empty(home: Path) -> None:
    """Remove the folders of a model of which nothing was loaded; who waits for the lock makes them anew."""
    with contextlib.suppress(OSError):  # something is there
        (home / "refs").rmdir()
        (home / ".lock").unlink()
        home.rmdir()


@contextlib.contextmanager
def _saying_that_no_folder_is_here(source: str) -> Iterator[None]:
    """Put first what a mistyped path means: it looks like a name of the hub."""
    try:
        yield
    except UserError as error:
        if source.startswith(PREFIX):
            raise
        raise UserError(f"no folder {source} is here, and as a model of the hub: {error}") from None


@contextlib.contextmanager
def _saying_where(home: Path) -> Iterator[None]:
    """Turn what the system says of the cache folder into one line."""
    try:
        yield
    except OSError as error:
        where = error.filename or home
        raise UserError(
            f"a model can't be kept in the cache: {where}: {error.strerror or error}; free space there, or "
            "set JAXGPT_CACHE (and HF_HOME, the hub's own cache) to another folder"
        ) from None


@contextlib.contextmanager
def _saying_what_is_missing(source: str) -> Iterator[None]:
    """Turn a missing package into one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{source} is not in the cache yet, and to download and convert it {error.name} is needed; "
            "pip install -c constraints.txt -e '.[hf,export]', or load an artifact made elsewhere"
        ) from None
