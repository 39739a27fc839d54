"""An artifact that is served: its weights, its scheduler, and what the API says of it."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxgpt.generation.sampling import Sampling, Top, damaged_model, draws_in_numpy, tops_in_numpy
from jaxgpt.generation.scheduling.scheduler import Scheduler
from jaxgpt.generation.session import BatchSession, ScoringSession
from jaxgpt.shared.tokenizer import Tokenizer

from jaxgpt_export.format.artifact import Artifact, read_certified_artifact
from jaxgpt_export.format.certificate import read_certificate
from jaxgpt_export.generation.open_session import CacheOption, Engine, OpenModel, open_model
from jaxgpt_export.serve.chat_template import ChatTemplate, read_chat_template
from jaxgpt_export.serve.worker import Worker

MOST_SLOTS = 64  # of running and of past texts


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
      running: texts of a model that are generated side by side.
      waiting: texts that wait for a slot.
      seconds: a text may take; 0: any time.
      cache_bytes: keys and values of past texts that a model keeps.
      body_bytes: of a request.
    """

    running: int
    waiting: int
    seconds: float
    cache_bytes: int
    body_bytes: int


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model that answers requests.

    Attributes:
      name: in the API.
      kind: fp32, int8-dynamic, ...
      engine: what computes.
      tokenizer: text <-> tokens.
      block_size: tokens that the model reads: a prompt and its continuation but for the last one.
      chat_template: None where the model has none.
      description: its object in /v1/models.
      scheduler: of its texts; its counts and numbers may be read.
      worker: runs it.
      draft_tokens: see `jaxgpt-export generate`.
      generation: how its tokens are drawn where a request says nothing; see Artifact.
    """

    name: str
    kind: str
    engine: str
    tokenizer: Tokenizer
    block_size: int
    chat_template: ChatTemplate | None
    description: dict[str, Any]
    scheduler: Scheduler
    worker: Worker
    draft_tokens: int
    generation: Mapping[str, int | float] = dataclasses.field(default_factory=dict)


class OneSlot:
    """A session of one text, such as the PyTorch module's, where slots are asked for."""

    slots = 1
    cache_bytes_per_token = 0

    def __init__(self, session: ScoringSession) -> None:
        self.block_size = session.block_size
        self._session = session
        self._length = 0  # tokens that it holds

    def forward(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        all_logits: bool = False,
        *,
        wanted: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Take tokens; see BatchSession."""
        if wanted is not None:
            all_logits = bool(wanted[:-1].any())
        logits = self._session.forward(tokens, all_logits=all_logits)
        self._length += len(tokens)
        if wanted is None:
            return logits
        return logits[wanted[-len(logits) :]]  # without all_logits there is the last row alone

    def greedy(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        all_logits: bool = False,
        *,
        wanted: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.int32]:
        """Take tokens; return the most probable next ones, UserError where a logit is not finite."""
        before = self._length
        logits = self.forward(tokens, slots, all_logits, wanted=wanted)
        if not np.isfinite(logits).all():
            self.truncate(before, 0)
            raise damaged_model()
        return logits.argmax(axis=1).astype(np.int32)

    def decode_greedy(
        self, token: int, max_tokens: int = 1, stop_token: int = -1, slot: int = 0
    ) -> list[int]:
        """Take a token; return the next one: nothing is won by several a call."""
        return [int(self.greedy([token], [0])[0])]

    def draw(
        self, logits: npt.NDArray[np.float32], samplings: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int | None]:
        """Draw a token from each row."""
        return draws_in_numpy(logits, samplings, uniforms)

    def top(
        self, logits: npt.NDArray[np.float32], temperatures: Sequence[float], count: int
    ) -> list[Top | None]:
        """Return what scoring needs of each row."""
        return tops_in_numpy(logits, temperatures, count)

    def truncate(self, length: int, slot: int) -> None:
        """Forget the tokens from `length` on."""
        self._session.truncate(length)
        self._length = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Not possible with one slot."""
        raise AssertionError("there is one slot")

    def release(self, slot: int) -> None:
        """Forget all tokens."""
        self.truncate(0, 0)

    def touch(self, slot: int, tokens: int) -> None:
        """Nothing is to be made ready."""


def open_served_model(
    name: str,
    folder: Path,
    limits: Limits,
    engine: Engine,
    threads: int,
    kv_cache: CacheOption,
    draft_tokens: int,
) -> ServedModel:
    """Read an artifact and make it ready to answer.

    Raises:
      UserError: see read_certified_artifact, read_chat_template and open_model.
    """
    artifact = read_certified_artifact(folder)
    template = read_chat_template(folder)
    tokenizer = artifact.tokenizer()
    model = open_model(artifact, engine, threads, kv_cache)
    artifact.tensors.clear()  # what runs has its own copy
    _ = tokenizer.longest_token  # found once, and not while others wait
    description = _describe(name, artifact, model.engine)
    session = _with_slots(model, limits)
    running = min(limits.running, session.slots)
    # Where a step's size changes bits, no text takes what another left, and none is drafted.
    scheduler = Scheduler(session, running, limits.cache_bytes if model.exact else None)
    return ServedModel(
        name,
        artifact.kind,
        model.engine,
        tokenizer,
        artifact.config.block_size,
        template,
        description,
        scheduler,
        Worker(scheduler, limits.waiting),
        draft_tokens if model.exact else 0,
        artifact.generation,
    )


def _with_slots(model: OpenModel, limits: Limits) -> BatchSession:
    """Return a session with slots for running texts, and for past ones if they are short."""
    session = model.new_session(1)
    if isinstance(session, BatchSession):
        past = 4 * limits.cache_bytes // max(session.cache_bytes_per_token * session.block_size, 1)
        session = model.new_session(min(limits.running + past, max(MOST_SLOTS, limits.running)))
        assert isinstance(session, BatchSession)
        return session
    assert isinstance(session, ScoringSession)
    return OneSlot(session)


def _describe(name: str, artifact: Artifact, engine: str) -> dict[str, Any]:
    """Return a model's object in /v1/models: what it is and what was measured, no path of this machine."""
    said: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "jaxgpt",
        "method": artifact.kind,
        "engine": engine,
        "max_model_len": artifact.config.block_size,
    }
    if artifact.generation:
        said["generation_config"] = dict(artifact.generation)
    if not (artifact.folder / "certificate.json").is_file():
        return said
    certificate = read_certificate(artifact.folder)
    said["sha256"] = certificate["files"].get("model.safetensors")
    figures = {
        key: value
        for key, value in {**certificate["parity"], **certificate.get("quality", {})}.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return said | {"certificate": {"step": certificate["origin"].get("step"), **figures}}
