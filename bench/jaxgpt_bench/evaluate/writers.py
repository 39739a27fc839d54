"""The models that write, and all their texts for one list of prompts: the engine's slots side by side."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import rich.progress
from jaxgpt_export.format.artifact import read_certified_artifact
from jaxgpt_export.generation.open_session import choose_threads, open_model

from jaxgpt.generation.generate import Request, generate_many
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.session import ScoringSession, Session
from jaxgpt.generation.state import Generation
from jaxgpt.shared.console import stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tokenizer import Tokenizer

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model that continues prompts.

    Attributes:
      name: its artifact's folder.
      kind: fp32, int8-dynamic, ...; of a second artifact of one kind with its folder's name.
      engine: what computes.
      session: with slots.
      tokenizer: of the model.
      weights_sha256: of its model.safetensors.
    """

    name: str
    kind: str
    engine: str
    session: Session
    tokenizer: Tokenizer
    weights_sha256: str


@dataclasses.dataclass(frozen=True)
class Texts:
    """What a model wrote, in the order of the prompts, and how fast, all side by side."""

    written: list[Generation]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second."""
        return sum(len(text.tokens) for text in self.written) / self.seconds

    @property
    def characters_per_s(self) -> float:
        """Generated characters a second, which models of different tokenizers share."""
        return sum(len(text.text) for text in self.written) / self.seconds


def open_writers(folders: Sequence[Path], threads: int, slots: int) -> list[Writer]:
    """Open artifacts.

    Raises:
      UserError: one is none, or two have another tokenizer: they would not write for the same prompts.
    """
    if not folders:
        raise UserError("evaluate needs at least one --artifact")
    count = choose_threads(threads)
    found: list[Writer] = []
    for folder in folders:
        artifact = read_certified_artifact(folder)
        model = open_model(artifact, "auto", count)
        session, tokenizer = model.new_session(slots), artifact.tokenizer()
        is_second = artifact.kind in [other.kind for other in found]  # float32 weights of another training
        kind = f"{artifact.kind} ({folder.name})" if is_second else artifact.kind
        weights = sha256_of(folder / "model.safetensors")
        writer = Writer(str(folder), kind, model.engine, session, tokenizer, weights)
        if found and writer.tokenizer.sha256 != found[0].tokenizer.sha256:
            raise UserError(f"{folder} has another tokenizer than {folders[0]}; compare models of one")
        found.append(writer)
    if len({writer.name for writer in found}) < len(found):
        raise UserError("an artifact is named twice")
    return found


def write_all(
    writer: Writer,
    prompts: Sequence[str],
    max_new_tokens: int,
    samplings: Sequence[Sampling],
    stop: Sequence[str] = (),
) -> Texts:
    """Continue each prompt with the sampling of its place."""
    requests = [
        Request(prompt, max_new_tokens, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    started = time.perf_counter()
    arrived = generate_many(writer.session, writer.tokenizer, requests, stop)
    texts = dict(shown(arrived, f"{writer.kind} writes", len(requests)))
    return Texts([texts[index] for index in range(len(requests))], time.perf_counter() - started)


def shown(items: Iterable[Item], what: str, count: int) -> Iterable[Item]:
    """Pass items on, with a bar that counts them where stderr is a terminal."""
    return rich.progress.track(
        items, what, total=count, console=stderr, transient=True, disable=not stderr.is_terminal
    )


def scorer_of(writer: Writer) -> ScoringSession:
    """Return the session that scores texts; UserError where an engine has none."""
    if not isinstance(writer.session, ScoringSession):
        raise UserError(f"{writer.name}: {writer.engine} does not score texts")
    return writer.session
