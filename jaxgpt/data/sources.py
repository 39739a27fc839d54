"""Turns what `--source` names into documents; they are read as they are asked for.

hub:NAME[@REVISION]   a Hugging Face dataset (the text column of one data file)
stdlib                docstring -> code pairs of the running interpreter's standard library
packages:NAME,...     the same from installed packages
PATH                  .jsonl, .json, .parquet, .txt, .py, or a folder of such files; all but .parquet may be
                      compressed: .jsonl.xz, .txt.gz, .py.zst
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxgpt.data.docstring_pairs import (
    SKIPPED_FOLDERS,
    interpreter,
    pairs_of_file,
    source_files,
    standard_library,
)
from jaxgpt.data.documents import OFFLINE_CHOICES, Document, Source
from jaxgpt.data.hub import hub_source
from jaxgpt.data.tables import TABLE_SUFFIXES, local_table_documents
from jaxgpt.data.text_files import COMPRESSED, kind_of, open_text
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import ENDOFTEXT

SUFFIXES = (*TABLE_SUFFIXES, ".txt", ".py")
# A lone text file is cut at blank lines into documents of about this size: a split needs several.
MIN_TEXT_BLOCK_CHARACTERS = 2000


def open_source(name: str, text_column: str = "text") -> Source:
    """Find a source.

    Args:
      name: as in the module's docstring.
      text_column: column of a table that holds the text.

    Raises:
      UserError: nothing of that name can be read; the message names the choices.
    """
    if name == "stdlib":
        return Source(name, interpreter(), _pairs(standard_library(), ""))
    if name.startswith("packages:"):
        return _packages(name)
    if name == "hub" or name.startswith("hub:"):
        return hub_source(name, text_column)
    path = Path(name)
    if not name or not path.exists():
        raise UserError(
            f"source {name!r} is neither hub:NAME, stdlib, packages:NAME,... nor an existing path; "
            f"{OFFLINE_CHOICES}"
        )
    files = _files_of(path)
    return Source(name, f"{len(files)} files", _local(files, path, text_column))


def _packages(name: str) -> Source:
    folders, versions = [], []
    for package in name.removeprefix("packages:").split(","):
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"package {package!r} is not installed here (or is a single module); "
                "give importable names, such as packages:numpy,jax"
            )
        folders.append((package, Path(next(iter(spec.submodule_search_locations)))))
        versions.append(f"{package} {_version(package)}")
    documents = (document for package, folder in folders for document in _pairs(folder, f"{package}/"))
    return Source(name, ", ".join(versions), documents)


def _version(package: str) -> str:
    distributions = importlib.metadata.packages_distributions().get(package, [])
    return importlib.metadata.version(distributions[0]) if distributions else "of unknown version"


def _pairs(folder: Path, prefix: str) -> Iterator[Document]:
    for path in source_files(folder):
        group = prefix + path.relative_to(folder).as_posix()
        for pair in pairs_of_file(path):
            yield Document(pair.text, group)


def _files_of(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _is_content(p, path))
    known = [file for file in files if _is_readable(file)]
    if not known:
        found = sorted({"".join(file.suffixes[-2:]) or file.name for file in files})[:5]
        raise UserError(f"{path} holds no {', '.join(SUFFIXES)} file; found: {', '.join(found) or 'nothing'}")
    return known


def _is_readable(file: Path) -> bool:
    kind = kind_of(file)
    return kind in SUFFIXES and not (kind == ".parquet" and file.suffix in COMPRESSED)


def _is_content(file: Path, root: Path) -> bool:
    """Whether a file below a folder is text of the user's: hidden and generated folders are left out."""
    folders = file.relative_to(root).parts[:-1]
    return file.is_file() and not any(f.startswith(".") or f in SKIPPED_FOLDERS for f in folders)


def _local(files: Sequence[Path], root: Path, text_column: str) -> Iterator[Document]:
    for file in files:
        group = file.relative_to(root).as_posix() if root.is_dir() else file.name
        if kind_of(file) == ".py":
            yield from (Document(pair.text, group) for pair in pairs_of_file(file))
        elif kind_of(file) == ".txt":
            with open_text(file) as opened:
                text = opened.read()
            yield from _text_documents(text, group, alone=len(files) == 1)
        else:
            yield from local_table_documents(file, text_column)


def _text_documents(text: str, group: str, alone: bool) -> Iterator[Document]:
    """Cut a text file into documents: at <|endoftext|>, or, for a lone file, at blank lines."""
    if ENDOFTEXT in text:
        yield from (Document(part, part) for part in text.split(ENDOFTEXT))
    elif not alone:
        yield Document(text, group)
    else:
        block: list[str] = []
        for paragraph in text.split("\n\n"):
            block.append(paragraph)
            if sum(map(len, block)) >= MIN_TEXT_BLOCK_CHARACTERS:
                joined = "\n\n".join(block)
                yield Document(joined, joined)
                block = []
        joined = "\n\n".join(block)
        yield Document(joined, joined)
