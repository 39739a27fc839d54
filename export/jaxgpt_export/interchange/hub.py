"""A GPT-2 of the Hugging Face hub: found by its name, downloaded whole or not at all. No PyTorch here.

huggingface_hub does the work: its cache (HF_HOME), its token (HF_TOKEN), its address (HF_ENDPOINT), its
progress bar. Of the weights only safetensors are fetched, and what lies in the cache is compared with the
hashes that the hub tells before it is used.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of, write_atomic
from jaxgpt.shared.huggingface import MODEL_TYPE, model_type_of

PREFIX = "hub:"
# As huggingface_hub has it, which refuses others as it refuses a network: up to 96 characters, no -- or ..
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
NAME = re.compile(rf"(?!.*(?:--|\.\.|\.git\Z))(?:{_PART}/)?{_PART}")
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_S = 10.0
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
INDEX = "model.safetensors.index.json"
OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    INDEX,
)


class UnreachableError(UserError):
    """The hub did not answer, or not to the end: no network, another address, or HF_HUB_OFFLINE."""


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A model that the hub has.

    Attributes:
      name: ORGANIZATION/NAME.
      revision: the branch, tag or commit that was asked for.
      commit: 40 hexadecimal digits, which the revision is now.
      hashes: of each file to fetch: sha256 of large files, Git's hash of small ones; "" where the hub tells
        none.
      license: as its card says; None where it does not.
      datasets: that it was trained on, as its card says.
    """

    name: str
    revision: str
    commit: str
    hashes: dict[str, str]
    license: str | None = None
    datasets: tuple[str, ...] = ()


def parse_name(text: str) -> tuple[str, str]:
    """Return name and revision of hub:NAME[@REVISION] or NAME[@REVISION]; the revision is "main" without one.

    Raises:
      UserError: it is no name.
    """
    name, at, revision = text.removeprefix(PREFIX).partition("@")
    if not NAME.fullmatch(name) or (at and not revision):
        raise UserError(
            f"{text!r} is no name of a model; expected hub:ORGANIZATION/NAME, such as "
            "hub:openai-community/gpt2, or with @REVISION behind it"
        )
    return name, revision or "main"


def find_model(name: str, revision: str) -> HubModel:
    """Ask the hub for a model; nothing is downloaded.

    Raises:
      UserError: the hub can't be reached, has no such model, gives it to members only, or holds its weights
        as a pickle alone.
    """
    import huggingface_hub

    with _asking_for(f"{name}@{revision}"):
        found = huggingface_hub.HfApi().model_info(
            name, revision=revision, timeout=TIMEOUT_S, files_metadata=True
        )
    siblings = {each.rfilename: each for each in found.siblings or []}
    weights = [file for file in siblings if WEIGHTS.fullmatch(file)]
    if "config.json" not in siblings:
        raise UserError(f"{name} on the hub holds no config.json, so it is no model of transformers")
    if not weights:
        pickles = [file for file in siblings if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        has = f"has its weights as a pickle alone ({pickles[0]})" if pickles else "holds no weights"
        raise UserError(
            f"{name} on the hub {has}, and only model.safetensors is loaded from there; take a revision "
            "that has it (@REVISION), or download the model yourself and give its folder to import-hf"
        )
    hashes = {file: _hash_of(siblings[file]) for file in (*OTHER_FILES, *weights) if file in siblings}
    card: Any = found.card_data or {}
    return HubModel(
        found.id,
        revision,
        str(found.sha),
        hashes,
        ", ".join(_texts(card.get("license"))) or None,
        _texts(card.get("datasets")),
    )


def download(model: HubModel, asked: str | None = None) -> Path:
    """Bring a model's files into the hub's cache and check them; return their folder.

    The configuration comes first: the weights of what is no GPT-2 are never fetched. At the end the cache is
    told which commit the revision is, so that both are found there without the hub.

    Args:
      model: of the hub.
      asked: the name that the cache is to know it by, where it was asked for by an earlier one.

    Raises:
      UserError: it is no GPT-2, a file could not be fetched, or is not the one that the hub names.
    """
    asked = asked or model.name
    folder = _fetch(model, "config.json", asked).parent
    kind = model_type_of(folder / "config.json", "model configuration")
    if kind != MODEL_TYPE:
        raise UserError(
            f"{model.name} on the hub has model_type {kind!r}, expected {MODEL_TYPE!r}; this program runs "
            "GPT-2s only"
        )
    for file in model.hashes:
        _fetch(model, file, asked)
    _keep_revision(folder, model)
    return folder


def _keep_revision(folder: Path, model: HubModel) -> None:
    """Write which commit a branch or tag is, as huggingface_hub does where it downloads by such a name."""
    ref = folder.parent.parent / "refs" / model.revision
    if COMMIT.fullmatch(model.revision) or (ref.is_file() and ref.read_text("utf-8") == model.commit):
        return
    with suppress(OSError):  # a cache that can only be read: it is a note for later alone
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(ref, model.commit)


def _fetch(model: HubModel, file: str, asked: str) -> Path:
    import huggingface_hub

    with _asking_for(f"{model.name}@{model.revision}: {file}"):
        path = Path(huggingface_hub.hf_hub_download(asked, file, revision=model.commit))
    expected = model.hashes[file]
    if expected and _content_hash(path, len(expected)) != expected:
        path.resolve().unlink(missing_ok=True)  # else the damaged file would be found again the next time
        path.unlink(missing_ok=True)
        raise UserError(
            f"{file} of {model.name} is not the file that the hub names (its hash differs); it was "
            f"removed from the cache, {path.parent}: run again to fetch it anew"
        )
    return path


def _content_hash(path: Path, digits: int) -> str:
    """Return a file's sha256 (64 digits), or the hash that Git gives it (40)."""
    if digits == 64:
        return sha256_of(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _hash_of(sibling: Any) -> str:
    lfs = sibling.lfs
    return str(lfs.sha256 if lfs is not None else sibling.blob_id or "")


def _texts(value: Any) -> tuple[str, ...]:
    """Return what a card says as texts: one, several, or what else stands there as none."""
    found = value if isinstance(value, list) else [value]
    return tuple(text for text in found if isinstance(text, str))


@contextmanager
def _asking_for(what: str) -> Iterator[None]:
    """Say in one line what was asked of whom when a call of huggingface_hub inside the block fails."""
    import huggingface_hub.constants
    from huggingface_hub import errors

    endpoint = huggingface_hub.constants.ENDPOINT
    huggingface_hub.logging.set_verbosity_error()  # what it warns of is said here, in one line
    asked = f"{what} was asked of {endpoint}"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{asked}, which gives it only to who accepted its terms; accept them there and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{asked}, which has no such revision; check what follows the @") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{asked}, which has no such model, or a private one; check the name, or set HF_TOKEN"
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise UserError(f"{asked}, which has no such file; take another revision") from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"{asked}, which {_refusal(error)}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise UserError(f"{asked}, which {_refusal(cause)}") from None
        raise UnreachableError(_unreachable(asked, cause or error)) from None
    except OSError as error:
        if error.errno is None:  # size of a file that was cut, among others
            raise UserError(f"{asked}: {_first_line(error)}; run again to fetch it anew") from None
        raise
    except Exception as error:  # whatever the HTTP library raises: no network is no bug
        raise UnreachableError(_unreachable(asked, error)) from None


def _refusal(error: Any) -> str:
    status = error.response.status_code
    reasons = {
        401: "did not accept the token (401); check HF_TOKEN, or leave it out",
        403: "refused it (403); check HF_TOKEN",
        429: "takes no more requests for now (429); wait a few minutes, or set HF_TOKEN",
    }
    if status in reasons:
        return reasons[status]
    if status >= 500:
        return f"has a fault of its own (status {status}); try again later"
    return f"answered with status {status} ({_first_line(error)})"


def _unreachable(asked: str, error: BaseException) -> str:
    if type(error).__name__ == "OfflineModeIsEnabled":
        return (
            f"{asked}, but HF_HUB_OFFLINE is set and its cache does not hold it; unset it, or give a folder"
        )
    return (
        f"{asked}, and the connection failed ({type(error).__name__}: {_first_line(error)}); "
        "check the network, or give a folder"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def fetch(name: str, revision: str, last_commit: str | None = None) -> tuple[HubModel, Path]:
    """Find and download a model; what the hub's cache holds of it where the hub can't be reached.

    Args:
      name: ORGANIZATION/NAME.
      revision: a branch, tag or commit.
      last_commit: what the revision was when the hub was last asked, if that is known.

    Returns:
      What it is, and the folder of its files.

    Raises:
      UserError: see find_model and download.
    """
    try:
        model = find_model(name, revision)
    except UnreachableError as error:
        folder = _cached_folder(name, last_commit or revision)
        if folder is None:
            raise
        say(f"{error}; what its cache holds is used: {folder}")
        return HubModel(name, revision, folder.name, {}), folder
    return model, download(model, name)


def _cached_folder(name: str, revision: str) -> Path | None:
    """Return what the hub's cache holds of a model; None where that is no model."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except (EntryNotFoundError, HFValidationError):
        return None
    weights = any(WEIGHTS.fullmatch(file.name) for file in folder.iterdir())
    return folder if weights and (folder / "config.json").exists() else None
