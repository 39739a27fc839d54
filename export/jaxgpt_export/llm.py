"""`from jaxgpt import LLM`: a model that writes and scores text, from an artifact or by its name on the hub.

    llm = LLM.load("runs/tiny-int8")
    print(llm.generate("Return the mean of a list. mean(values)", max_new_tokens=60))

It runs what `jaxgpt-export generate` runs, after the same checks: the native engine where it can, without
PyTorch; the PyTorch module else.
"""

import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from jaxgpt.generation.generate import (
    DRAFT_TOKENS,
    SIDE_BY_SIDE,
    Request,
    decode_steps,
    generate,
    generate_many,
)
from jaxgpt.generation.sampling import choose_sampling
from jaxgpt.generation.scoring import log_probabilities
from jaxgpt.generation.session import ScoringSession
from jaxgpt.generation.state import GenerationState
from jaxgpt.shared.console import missing_package
from jaxgpt.shared.errors import UserError, quoted
from jaxgpt.shared.tokenizer import Tokenizer

from jaxgpt_export.format.artifact import Artifact, read_certified_artifact
from jaxgpt_export.generation.open_session import (
    CacheOption,
    Engine,
    OpenModel,
    check_choices,
    choose_threads,
    open_model,
)
from jaxgpt_export.pretrained import DEFAULT_METHOD, load_pretrained, names_hub_model

TORCH_ENGINE = "jaxgpt-torch"  # the module's name in `engine`
_models: "weakref.WeakSet[LLM]" = weakref.WeakSet()


class LLM:
    """A model that writes and scores text; made by `LLM.load`.

    Several threads may use one: they take turns, a stream at each piece. Pickled or copied it is the name of
    its folder, and is loaded from there again.

    Attributes:
      tokenizer: text <-> tokens.
      kind: fp32, int8-dynamic, int4-weight-only, ...
      engine: what computes, such as "jaxgpt-native (avx512-vnni)" or "jaxgpt-torch".
      context_tokens: how many tokens the model reads: a prompt and its continuation but for the last one.
      folder: the artifact folder.
    """

    def __init__(self, artifact: Artifact, tokenizer: Tokenizer, model: OpenModel) -> None:
        self.tokenizer = tokenizer
        self.kind = artifact.kind
        self.engine = model.engine
        self.context_tokens = artifact.config.block_size
        self.folder = artifact.folder
        self._generation = artifact.generation
        self._lies_in = artifact.folder.absolute()  # whatever folder is the current one later
        self._model = model
        self._session = model.new_session(1)
        self._turn = threading.Lock()
        self._settings: dict[str, Any] = {}  # that `load` was given beside the folder
        _models.add(self)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        method: str | None = None,
        refresh: bool = False,
        engine: Engine = "auto",
        threads: int = 0,
        kv_cache: CacheOption = "auto",
    ) -> "LLM":
        """Load a model.

        Args:
          source: an artifact folder; or the name of a GPT-2 on the Hugging Face hub, ORGANIZATION/NAME or
            ORGANIZATION/NAME@REVISION. A folder that exists is taken as a folder; hub:NAME is always a name.
          method: of a model of the hub: "fp32", or how it is quantized; "int8-dynamic" if not given. What was
            downloaded and quantized once is kept in the user's cache folder and loaded at once.
          refresh: of a model of the hub: ask again which revision is the current one.
          engine: "native", "torch", or "auto": native where it can.
          threads: that compute; 0 takes all cores that this process may use.
          kv_cache: what the native engine keeps keys and values as: "fp32", "fp16", "int8", or "auto":
            fp16, and fp32 beside float32 weights.

        Raises:
          UserError: no such folder or model, a file that was altered, a hub that can't be reached, ...; one
            line that says what to do.
        """
        threads = choose_threads(threads)
        check_choices(engine, kv_cache)
        _require_source(source)
        if not str(source):
            raise UserError("the source of a model is empty; give an artifact folder, or a name of the hub")
        if names_hub_model(str(source)):
            folder = load_pretrained(str(source), DEFAULT_METHOD if method is None else method, refresh)
        else:
            folder = Path(source)
            if method is not None or refresh:
                raise UserError(
                    f"{folder} is a folder here; method and refresh are for models of the hub: leave them "
                    f"out, or write hub:{source} for the model of that name"
                )
        artifact = _read(folder, str(source))
        try:
            llm = cls(artifact, artifact.tokenizer(), open_model(artifact, engine, threads, kv_cache))
        except ModuleNotFoundError as error:  # of a tokenizer that tiktoken does not know, of the module
            if (wanted := missing_package(error)) is None:
                raise
            raise UserError(f"{folder} needs {wanted}") from None
        artifact.tensors.clear()  # what runs has its own copy
        llm._settings = {"engine": engine, "threads": threads, "kv_cache": kv_cache}
        return llm

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how another process makes the same: what computes can't be copied into it."""
        return _load_again, (str(self._lies_in), self._settings)

    def __repr__(self) -> str:
        return f"LLM({str(self.folder)!r}, {self.kind}, {self.engine})"

    @overload
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        min_p: float | None = ...,
        repetition_penalty: float | None = ...,
        no_repeat_ngram_size: int | None = ...,
        seed: int = ...,
        stop: str | Sequence[str] = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        max_new_tokens: int = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        min_p: float | None = ...,
        repetition_penalty: float | None = ...,
        no_repeat_ngram_size: int | None = ...,
        seed: int = ...,
        stop: str | Sequence[str] = ...,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        max_new_tokens: int = 200,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> str | list[str]:
        """Continue a prompt, or several side by side.

        Args:
          prompt: text to continue, or a list of texts; an empty one starts a new document.
          max_new_tokens: tokens to generate at most.
          temperature: divides the logits; 0 takes the most probable token. None: what the model's
            generation_config.json says, else 0.8.
          top_k: keep the k most probable tokens; 0 keeps all. None: the model's, else 0.
          top_p: keep the fewest tokens whose probabilities reach p. None: the model's, else 1.
          min_p: keep tokens at least this share as probable as the most probable one; 0 keeps all. None: the
            model's, else 0.05.
          repetition_penalty: divides the positive logits of tokens that the text has, its prompt included,
            and multiplies the negative ones, as transformers does. None: the model's, else 1 (none).
          no_repeat_ngram_size: no run of so many tokens comes twice, the prompt's included. None: the
            model's, else 0 (any may).
          seed: of the random numbers; the same seed gives the same text.
          stop: a text, or several, that ends the generation and is not part of it.

        Returns:
          What was generated, the prompt not included; for a list the list of texts, each the one that it
          would be alone.

        Raises:
          UserError: a prompt leaves no room for a token, or a value is out of range.
        """
        asked = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "no_repeat_ngram_size": no_repeat_ngram_size,
        }  # fmt: skip
        sampling, stops = choose_sampling(self._generation, seed, **asked), _as_tuple(stop)
        if not isinstance(prompt, str):
            _require_texts("prompt", prompt)
        if isinstance(prompt, str):
            with self._turn:
                arguments = (self._session, self.tokenizer, prompt, max_new_tokens, sampling, stops)
                return generate(*arguments, draft_tokens=DRAFT_TOKENS).text
        requests = [Request(text, max_new_tokens, sampling) for text in prompt]
        for request in requests:  # all are checked before any is begun
            GenerationState(self.tokenizer, request.prompt, self.context_tokens, max_new_tokens, sampling)
        texts = [""] * len(requests)
        with self._turn:
            session = self._model.new_session(max(1, min(len(requests), SIDE_BY_SIDE)))
            for index, done in generate_many(session, self.tokenizer, requests, stops):
                texts[index] = done.text
        return texts

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Continue a prompt, piece by piece; the pieces together are the text that `generate` returns.

        Args:
          prompt: text to continue; an empty one starts a new document.
          max_new_tokens: as the next ones, see `generate`.
          temperature: see `generate`.
          top_k: see `generate`.
          top_p: see `generate`.
          min_p: see `generate`.
          repetition_penalty: see `generate`.
          no_repeat_ngram_size: see `generate`.
          seed: see `generate`.
          stop: see `generate`.

        Returns:
          An iterator over text as soon as it is certain: whole characters, and nothing that may become a stop
          text.

        Raises:
          UserError: as `generate`, at the call and not at the first piece.
        """
        _require_texts("prompt", (prompt,))
        pieces: list[str] = []
        asked = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "no_repeat_ngram_size": no_repeat_ngram_size,
        }  # fmt: skip
        state = GenerationState(
            self.tokenizer,
            prompt,
            self.context_tokens,
            max_new_tokens,
            choose_sampling(self._generation, seed, **asked),
            _as_tuple(stop),
            pieces.append,
        )
        return self._pieces(state, pieces)

    def _pieces(self, state: GenerationState, pieces: list[str]) -> Iterator[str]:
        steps = decode_steps(self._model.new_session(1), state, DRAFT_TOKENS)
        while not state.finished():
            with self._turn:
                next(steps)
            text = "".join(pieces)
            pieces.clear()
            if text:
                yield text

    def logprobs(self, text: str) -> npt.NDArray[np.float64]:
        """Return how likely the model finds a text at the start of a document.

        Args:
          text: of at most `context_tokens` tokens.

        Returns:
          (N,), for each token of `tokenizer.encode(text, special=True)`, as a prompt is read, the natural
          logarithm of its probability, given <|endoftext|> and the tokens before it; their sum is the text's
          log-probability in nats.

        Raises:
          UserError: the text has more tokens than the context holds.
        """
        _require_texts("text", (text,))
        tokens = self.tokenizer.encode(text, special=True)
        assert isinstance(self._session, ScoringSession)
        with self._turn:
            return log_probabilities(self._session, tokens, self.tokenizer.endoftext)


def _end_turns() -> None:
    """In a forked process the thread whose turn it was is not here to end it, nor are PyTorch's threads."""
    for model in list(_models):
        model._turn = threading.Lock()
        if model.engine == TORCH_ENGINE:
            import torch

            torch.set_num_threads(1)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_end_turns)


def _load_again(folder: str, settings: dict[str, Any]) -> LLM:
    """Load what was pickled; UserError where its folder is not there."""
    threads = min(settings.get("threads", 0), choose_threads(0))  # fewer cores may be here
    return LLM.load(folder, **{**settings, "threads": threads})


def _read(folder: Path, source: str) -> Artifact:
    """Read an artifact; UserError with what helps, of one in the cache too."""
    try:
        return read_certified_artifact(folder)
    except UserError as error:
        if str(folder) == source or not names_hub_model(source):
            raise
        raise UserError(
            f"what the cache has of {source} can't be used ({error}); refresh=True makes it anew"
        ) from None


def _require_source(source: object) -> None:
    """Raise UserError unless a source is text or a path."""
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"the source of a model is {quoted(source)}; expected a folder, or a name of the hub")


def _as_tuple(stop: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop, str):
        return (stop,)
    _require_texts("stop", stop)
    return tuple(stop)


def _require_texts(name: str, texts: object) -> None:
    """Raise UserError unless texts are a list or tuple of str: bytes, say, would be walked through."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name} is {quoted(texts)}; expected text (str), or a list of texts")
