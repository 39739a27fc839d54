"""Hugging Face's GPT-2: with its cache, or as the earlier project ran it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from jaxgpt_bench.peers.peer import (
    NO_SETTINGS,
    OPENMP,
    PLAIN,
    Artifact,
    Peer,
    Prepared,
    Settings,
    Variant,
    float_bytes,
)


class TransformersSession:
    """Hugging Face's GPT-2, with its own cache or, as the earlier project ran it, without."""

    def __init__(self, folder: str, cached: bool, every_logit: bool) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.block_size = int(self.model.config.n_positions)
        self._cached = cached
        self._logits_to_keep = 0 if every_logit else 1  # 0: all; 1 is what generate() asks for
        self._past: Any = None
        self._tokens: list[int] = []

    def prefill(self, tokens: Any) -> Any:
        """Take a prompt; return the logits (V,) after it."""
        self._past, self._tokens = None, list(tokens)
        return self._run(list(tokens))

    def decode(self, token: int) -> Any:
        """Take one more token; return the logits (V,) after it."""
        self._tokens.append(token)
        return self._run([token] if self._cached else self._tokens)

    def _run(self, tokens: Sequence[int]) -> Any:
        with self._torch.inference_mode():
            out = self.model(
                self._torch.tensor([tokens]),
                past_key_values=self._past if self._cached else None,
                use_cache=self._cached,
                logits_to_keep=self._logits_to_keep,
            )
        self._past = out.past_key_values if self._cached else None
        return out.logits[0, -1].numpy()


class Transformers(Peer):
    """Hugging Face's GPT-2; the artifact folder is what it loads."""

    engine: ClassVar[str] = "transformers"
    modules: ClassVar[tuple[str, ...]] = ("transformers",)
    install: ClassVar[str] = "transformers"
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    environments: ClassVar[tuple[dict[str, str], ...]] = OPENMP
    variants: ClassVar[tuple[Variant, ...]] = (
        PLAIN,
        Variant(cached=False),
        Variant(cached=False, every_logit=True),
    )

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Give the artifact's own folder."""
        return Prepared(artifact.folder / "model.safetensors", float_bytes(artifact))

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> TransformersSession:
        """Load the folder."""
        import torch

        torch.set_num_threads(threads)
        return TransformersSession(str(path.parent), variant.cached, variant.every_logit)


PEER = Transformers()
