"""Sources of text: what `--source` may name, each turned into documents.

hub:NAME[@REVISION]   a Hugging Face dataset (the text column of one data file)
stdlib                docstring -> code pairs of the running interpreter's standard library
packages:NAME,...     the same from installed packages
PATH                  .jsonl, .json, .parquet, .txt, .py, or a folder of such files
"""

import dataclasses
import glob
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.data.pairs import SKIPPED_FOLDERS, interpreter, pairs_of_file, source_files, standard_library
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import ENDOFTEXT

DEFAULT_HUB_NAME = "flytech/python-codes-25k"
HUB_TIMEOUT_S = 8.0
OFFLINE_CHOICES = "offline choices: --source stdlib, --source packages:NAME,..., or a local file or folder"
TABLE_SUFFIXES = (".parquet", ".jsonl", ".json")  # in order of preference
SUFFIXES = (*TABLE_SUFFIXES, ".txt", ".py")
# A lone text file has no documents of its own; blocks of this size, cut at blank lines, stand in.
MIN_TEXT_BLOCK_CHARACTERS = 2000


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that is never cut by the split.

    Attributes:
      text: what is trained on.
      group: documents of one group fall into the same split: the file for code, else the document.
    """

    text: str
    group: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents, with where they came from.

    Attributes:
      name: the --source that was given.
      revision: commit, version or file list that tells which text it was.
      documents: read as they are asked for.
    """

    name: str
    revision: str
    documents: Iterable[Document]


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
        return _hub(name, text_column)
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
    known = [file for file in files if file.suffix in SUFFIXES]
    if not known:
        found = sorted({file.suffix or file.name for file in files})[:5]
        raise UserError(f"{path} holds no {', '.join(SUFFIXES)} file; found: {', '.join(found) or 'nothing'}")
    return known


def _is_content(file: Path, root: Path) -> bool:
    """Whether a file below a folder is text of the user's: hidden and generated folders are left out."""
    folders = file.relative_to(root).parts[:-1]
    return file.is_file() and not any(f.startswith(".") or f in SKIPPED_FOLDERS for f in folders)


def _local(files: Sequence[Path], root: Path, text_column: str) -> Iterator[Document]:
    for file in files:
        group = file.relative_to(root).as_posix() if root.is_dir() else file.name
        if file.suffix == ".py":
            yield from (Document(pair.text, group) for pair in pairs_of_file(file))
        elif file.suffix == ".txt":
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 text ({error}); convert it first") from None
            yield from _text_documents(text, group, alone=len(files) == 1)
        else:
            yield from table_documents(load_table([str(file)]), text_column, str(file))


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


def load_table(data_files: Sequence[str]) -> Any:
    """Open .json, .jsonl or .parquet files (or hub paths of such) with `datasets`, as one table."""
    import datasets  # slow to import

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it would log, our own line says
    datasets.disable_progress_bars()
    kind = "parquet" if data_files[0].endswith(".parquet") else "json"
    try:
        return datasets.load_dataset(kind, data_files=[_escaped(f) for f in data_files], split="train")
    except StopIteration:  # files without a byte
        raise UserError(f"{data_files[0]} is empty; give a {kind} table with text in it") from None
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        cause = str(error.__cause__ or error).splitlines()[0][:200]
        raise UserError(f"{data_files[0]} is no readable {kind} table: {cause}") from None


def _escaped(file: str) -> str:
    """Keep `datasets` from reading brackets and stars in a local path as a pattern."""
    return file if file.startswith("hf://") else glob.escape(file)


def table_documents(table: Any, text_column: str, where: str) -> Iterator[Document]:
    """Yield the rows of a table; each is its own group.

    Raises:
      UserError: there is no such column, or it does not hold text.
    """
    if text_column not in table.column_names:
        raise UserError(
            f"{where} has no column {text_column!r}; it has {', '.join(table.column_names)}; "
            "name one with --text-column"
        )
    for number, text in enumerate(table[text_column]):
        if not isinstance(text, str):
            raise UserError(
                f"{where} row {number}: column {text_column!r} holds {type(text).__name__}, no text"
            )
        yield Document(text, text)


def _hub(name: str, text_column: str) -> Source:
    """Open a data set of the hub: one kind of data file, at the commit that the hub names."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = (name.partition(":")[2] or DEFAULT_HUB_NAME).partition("@")
    try:
        info = huggingface_hub.HfApi().dataset_info(
            repository, revision=revision or None, timeout=HUB_TIMEOUT_S
        )
    except (HfHubHTTPError, huggingface_hub.errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the hub has no data set {repository!r} to give: {reason}; {OFFLINE_CHOICES}"
        ) from None
    except Exception as error:  # whatever the HTTP library raises: no network is no bug
        raise UserError(
            f"the hub can't be reached for {repository!r} ({type(error).__name__}); {OFFLINE_CHOICES}"
        ) from None
    files = choose_data_files([sibling.rfilename for sibling in info.siblings or []], repository)
    urls = [f"hf://datasets/{repository}@{info.sha}/{file}" for file in files]
    return Source(name, str(info.sha), table_documents(load_table(urls), text_column, repository))


def choose_data_files(files: Sequence[str], repository: str) -> list[str]:
    """Choose the data files of a hub repository that hold each row once.

    Some repositories hold the same rows in several formats (python-codes-25k as .json and .jsonl), so
    only one kind is taken, the first that there is of .parquet, .jsonl, .json; of it, the training files
    where names tell.
    """
    for suffix in TABLE_SUFFIXES:
        chosen = [file for file in files if file.endswith(suffix) and not file.startswith(".")]
        if chosen:
            return [file for file in chosen if "train" in file.rpartition("/")[2]] or chosen
    raise UserError(f"hub data set {repository!r} holds no .parquet, .jsonl or .json file")
