"""Opens a data set of the Hugging Face hub: hub:NAME[@REVISION].

What needs the network is imported when it is used.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from jaxgpt.data.documents import OFFLINE_CHOICES, Document, Piece
from jaxgpt.data.reading.columns import Columns
from jaxgpt.data.report import ReadReport
from jaxgpt.data.tables import load_table, table_documents
from jaxgpt.shared.errors import UserError

DEFAULT_HUB_NAME = "flytech/python-codes-25k"
HUB_TIMEOUT_S = 8.0
HUB_SUFFIXES = (".parquet", ".jsonl", ".json")  # in order of preference
# Words for splits in names of files and folders: the hub's own loader's, and "trainset", "testset".
TRAINING = re.compile("(?<![a-z])train(ing)?(set)?(?![a-z])", re.IGNORECASE)
OTHER_SPLIT = re.compile(
    "(?<![a-z])(test(ing|set)?|val(id(ation)?)?|dev|eval(uation)?)(?![a-z])", re.IGNORECASE
)


def hub_pieces(name: str) -> tuple[str, list[Piece]]:
    """Find a data set of the hub: one kind of data file, at the commit that the hub names.

    Args:
      name: hub, hub:NAME or hub:NAME@REVISION.

    Returns:
      The commit, and a piece a file.

    Raises:
      UserError: the hub can't be reached, or has no such data set; the message names sources without network.
    """
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
    return str(info.sha), [Piece(path=url, group=repository, kind="hub") for url in urls]


def hub_documents(piece: Piece, columns: Columns, report: ReadReport) -> Iterator[Document]:
    """Yield the documents of a file of the hub.

    Args:
      piece: of `hub_pieces`.
      columns: what makes a document of a row.
      report: gains what is left out.
    """
    yield from table_documents(load_table([piece.path]), columns, piece.group, report)


def choose_data_files(files: Sequence[str], repository: str) -> list[str]:
    """Choose the data files of a hub repository that hold each row once.

    Some repositories hold the same rows in several formats (python-codes-25k as .json and .jsonl), so
    only one kind is taken, the first that there is of .parquet, .jsonl, .json. Of it, where names of files
    or folders tell training files, those; else all but those of other splits.
    """
    for suffix in HUB_SUFFIXES:
        chosen = [file for file in files if file.endswith(suffix) and not file.startswith(".")]
        if chosen:
            splits = {file: _split_of(file) for file in chosen}
            return (
                [file for file in chosen if splits[file] == "train"]
                or [file for file in chosen if splits[file] is None]
                or chosen
            )
    raise UserError(f"hub data set {repository!r} holds no .parquet, .jsonl or .json file")


def _split_of(file: str) -> Literal["train", "other"] | None:
    """Tell which split a file is of, by the last part of its path that names one; None where none does."""
    for part in reversed(file.split("/")):
        if OTHER_SPLIT.search(part):
            return "other"
        if TRAINING.search(part):
            return "train"
    return None
