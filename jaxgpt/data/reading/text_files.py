"""Text files: decoded, and cut into documents."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.data.documents import Document
from jaxgpt.data.reading.opening import open_file
from jaxgpt.data.report import ReadReport
from jaxgpt.shared.tokenizer import ENDOFTEXT

# A lone text file is cut into documents of about this size: a split needs several.
MIN_TEXT_BLOCK_CHARACTERS = 2000
# Where it is cut: the first of these that cuts it at all; pattern, and what stood there.
_SEPARATORS = (("\n\n", "\n\n"), (r"\n[ \t]+\n", "\n\n"), ("\n", "\n"), (" +", " "))
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SNIFFED_BYTES = 4096
_BINARY_SHARE = 0.1  # of zero bytes among the first, from which on a file is no text


def read_text(path: Path, report: ReadReport, begin: int = 0, end: int | None = None) -> str | None:
    r"""Read a UTF-8 file, compressed or not; line ends become \n, and a byte order mark is left out.

    Args:
      path: the file.
      report: gains what is left out.
      begin: first byte of the range to read.
      end: where the range ends; None for the end of the file.

    Returns:
      The text; None where the file is no such text and is left out.

    Raises:
      UserError: it is no such text and errors are not skipped.
    """
    with open_file(path) as file:
        if begin:
            file.seek(begin)
        content = file.read() if end is None else file.read(end - begin)
    if content.startswith(_UTF_16):
        report.damaged(f"{path} is UTF-16; convert it to UTF-8", "UTF-16 files", str(path))
        return None
    if _is_binary(content[:_SNIFFED_BYTES]):
        report.damaged(
            f"{path} holds zero bytes: it is UTF-16 or no text; convert it", "binary files", str(path)
        )
        return None
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text ({error}); convert it first"
        report.damaged(message, "files that are not UTF-8", str(path))
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_plain_text(path: Path) -> bool:
    """Tell by its first bytes whether a file may be UTF-8 text."""
    with path.open("rb") as file:
        head = file.read(_SNIFFED_BYTES)
    return not head.startswith(_UTF_16) and not _is_binary(head)


def _is_binary(head: bytes) -> bool:
    return head.count(0) > _BINARY_SHARE * len(head)


def text_documents(text: str, group: str, alone: bool, separated: bool = True) -> Iterator[Document]:
    """Cut a text file into documents: at <|endoftext|>, or, for a lone file, into blocks.

    Args:
      text: what the file holds.
      group: its name.
      alone: whether it is the only file.
      separated: whether <|endoftext|> ends a document; in source code it is a text like any other.
    """
    if separated and ENDOFTEXT in text:
        yield from (Document(part, part) for part in text.split(ENDOFTEXT))
    elif not alone:
        yield Document(text, group)
    else:
        yield from (Document(block, block) for block in _blocks(text))


def _blocks(text: str) -> list[str]:
    """Cut a text into blocks of about 2,000 characters, where it has blank lines, else lines, else spaces."""
    for pattern, separator in _SEPARATORS:
        parts = text.split(separator) if pattern == separator else re.split(pattern, text)
        blocks, block, size = [], [], 0
        for part in parts:
            block.append(part)
            size += len(part)
            if size >= MIN_TEXT_BLOCK_CHARACTERS:
                blocks.append(separator.join(block))
                block, size = [], 0
        blocks.append(separator.join(block))
        if sum(bool(each.strip()) for each in blocks) > 1:
            return blocks
    return [text]
