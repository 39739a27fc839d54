"""What `--tokenizer gpt2` and `--tokenizer FOLDER` mean."""

from pathlib import Path

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer.folder import has_tokenizer, load_tokenizer
from jaxgpt.shared.tokenizer.gpt2_files import gpt2_tokenizer
from jaxgpt.shared.tokenizer.tokenizer import Tokenizer

MIN_BYTE_LEVEL = 256  # tokens: one a byte
OF_CHARACTERS = (
    "fewer than there are bytes: it is a model of characters (nanoGPT's shakespeare_char is one), which "
    "can't be imported, as every model here has a byte-level BPE; train one on the text: "
    "jaxgpt prepare --tokenizer bpe:512, then jaxgpt train"
)


def named_tokenizer(name: str) -> Tokenizer:
    """Return GPT-2's tokenizer, or a folder's.

    Raises:
      UserError: the folder holds none, or one that can't be run here.
    """
    if name == "gpt2":
        return gpt2_tokenizer()
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"tokenizer {name!r} is neither gpt2 nor a folder with a tokenizer; check the path")
    if not has_tokenizer(folder) and (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} holds meta.pkl, nanoGPT's list of characters, and no tokenizer; "
            f"such a model has tokens {OF_CHARACTERS}"
        )
    return load_tokenizer(folder, "imported")
