"""Text that others have tokenized: files of 16-bit tokens, cut into documents at <|endoftext|>.

    tokens:data/openwebtext            a folder: every .bin in it, in the order of their names
    tokens:fineweb_train_000001.bin    one file

nanoGPT's .bin holds tokens alone; the shards of llm.c and modded-nanogpt begin with 256 32-bit integers:
20240520, the version 1 and the number of tokens.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxgpt.data.documents import Piece
from jaxgpt.data.reading.pieces import piece_bytes
from jaxgpt.shared.dataset import TOKEN_DTYPE, Tokens
from jaxgpt.shared.dataset.shards import map_file
from jaxgpt.shared.errors import UserError

PREFIX = "tokens:"
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
LLAMA_MAGIC = 20240801  # llm.c's files of 32-bit tokens
_TOKENS_AT_ONCE = 1 << 20


def token_pieces(name: str, endoftext: int) -> tuple[str, list[Piece]]:
    """Find the files of a source tokens:PATH, and cut large ones between documents.

    Args:
      name: the source.
      endoftext: the token that separates documents.

    Returns:
      What tells which text it was, and the pieces; a file with "val" or "train" in its name is that split's.

    Raises:
      UserError: there is no such file, or it is none of tokens.
    """
    path = Path(name.removeprefix(PREFIX))
    files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    if masks := [file.name for file in files if file.name.endswith(".mask.bin")]:
        raise UserError(
            f"source {name!r} is a data set whose loss counts answers alone ({masks[0]}), and tokens do not "
            "tell which; prepare its text again"
        )
    if not path.exists() or not files:
        raise UserError(f"source {name!r} names no file; give a .bin file of tokens, or a folder with some")
    limit = piece_bytes(sum(file.stat().st_size for file in files))
    pieces = [piece for file in files for piece in _cut(file, limit // 2, endoftext)]
    return f"{len(files)} files", pieces


def split_of(path: Path) -> str | None:
    """Return the split that a file's name says it holds: train, val or None."""
    name = path.name.lower()
    return next((split for split in ("train", "val") if split in name), None)


def token_documents(piece: Piece, endoftext: int, vocab_size: int) -> Iterator[Tokens]:
    """Yield the documents of a piece without the tokens that separate them.

    Args:
      piece: of `token_pieces`.
      endoftext: the token that separates documents.
      vocab_size: V; every token must be less.

    Raises:
      UserError: one is not.
    """
    tokens = read_tokens(Path(piece.path))
    begin, open_parts = piece.begin, [tokens[:0]]
    while begin < (piece.end or len(tokens)):
        part = np.array(tokens[begin : min(begin + _TOKENS_AT_ONCE, piece.end or len(tokens))])
        if (largest := int(part.max())) >= vocab_size:
            at = begin + int(part.argmax())
            raise UserError(
                f"{piece.path} holds token {largest} at {at}, the tokenizer has 0 to {vocab_size - 1}; give "
                "the --tokenizer that made it"
            )
        first, *rest = np.split(part, np.flatnonzero(part == endoftext))
        open_parts.append(first)
        for document in rest:
            yield np.concatenate(open_parts)
            open_parts = [document[1:]]
        begin += len(part)
    yield np.concatenate(open_parts)


def read_tokens(path: Path) -> Tokens:
    """Map the tokens of a file, its header checked and left out.

    Raises:
      UserError: it is none of 16-bit tokens, or its length is another than it says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4")
    if head[0] == LLAMA_MAGIC:
        raise UserError(f"{path} holds 32-bit tokens (its header says {LLAMA_MAGIC}); 16-bit ones are read")
    if head[0] != MAGIC:
        if size < 2 or size % 2:
            raise UserError(f"{path} has {size} bytes, expected 2 a token; it is cut, or holds no tokens")
        return map_file(path, TOKEN_DTYPE)
    if head[1] != VERSION:
        raise UserError(f"{path} has version {head[1]} in its header, expected {VERSION}; tokenize it again")
    if size != HEADER_BYTES + 2 * int(head[2]):
        raise UserError(
            f"{path} has {size} bytes, its header says {head[2]} tokens, which are "
            f"{HEADER_BYTES + 2 * int(head[2])}; it is cut or damaged, fetch it again"
        )
    return map_file(path, TOKEN_DTYPE)[HEADER_BYTES // 2 :]


def _cut(path: Path, limit: int, endoftext: int) -> Iterator[Piece]:
    tokens = read_tokens(path)
    begin = 0
    while begin < len(tokens):
        end = len(tokens)
        for start in range(begin + limit, len(tokens), _TOKENS_AT_ONCE):
            found = np.flatnonzero(tokens[start : start + _TOKENS_AT_ONCE] == endoftext)
            if len(found):
                end = start + int(found[0])
                break
        yield Piece(
            path=str(path), group=path.name, kind="tokens", begin=begin, end=end, size=2 * (end - begin)
        )
        begin = end + 1
