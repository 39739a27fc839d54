"""CTranslate2, from its own converter.

int8-dynamic is its int8_float32: a scale a row of weights, a scale a token of inputs.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxgpt_bench.peers.peer import (
    NO_SETTINGS,
    PLAIN,
    Artifact,
    Floats,
    Peer,
    Prepared,
    Settings,
    Variant,
    weight_bytes,
)

COMPUTE = {"fp32": "float32", "int8-dynamic": "int8_float32"}


class CTranslate2Session:
    """A generator. Its cache lives only while it generates, so that it is timed doing that by itself.

    Tokens go in and out as the names that `convert` gave them, their numbers.
    """

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import ctranslate2

        self._generator = ctranslate2.Generator(
            str(path), device="cpu", inter_threads=1, intra_threads=threads, compute_type=COMPUTE[precision]
        )
        shape = json.loads((path / "shape.json").read_text(encoding="utf-8"))
        self.block_size, self._beyond = shape["block_size"], shape["vocab_size"]
        self._tokens: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> Any:
        """Take a prompt; return the logits (V,) after it, without a cache: to compare, not to time."""
        self._tokens = list(tokens)
        return self.forward(self._tokens)[-1]

    def forward(self, tokens: Sequence[int]) -> Any:
        """Return the logits (T, V) of a whole text; each token's inputs have a scale of their own."""
        return np.array(self._generator.forward_batch([list(tokens)]))[0]

    def decode(self, token: int) -> Any:
        """Take one more token; return the logits (V,) after it, running the whole text again."""
        return self.prefill([*self._tokens, token])

    def generate_greedily(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        """Generate exactly so many tokens; see `jaxgpt_bench.common.timing.timed_generation`."""
        first: list[float] = []

        def note(result: Any) -> bool:
            if not first:
                first.append(time.perf_counter())
            return False

        started = time.perf_counter()
        (result,) = self._generator.generate_batch(
            [[str(token) for token in prompt]],
            beam_size=1,
            sampling_topk=1,
            max_length=count,
            end_token=[self._beyond],  # no token of the model's: it never stops early
            include_prompt_in_result=False,
            callback=note,
        )
        done = time.perf_counter()
        tokens = [int(name) for name in result.sequences[0]]
        if len(tokens) != count:
            raise RuntimeError(f"CTranslate2 made {len(tokens)} tokens of {count}")
        return {"tokens": tokens, "prefill_s": first[0] - started, "decode_s": done - first[0]}


class CTranslate2(Peer):
    """CTranslate2."""

    engine: ClassVar[str] = "ctranslate2"
    modules: ClassVar[tuple[str, ...]] = ("ctranslate2", "transformers")
    install: ClassVar[str] = "ctranslate2 transformers"
    precisions: ClassVar[tuple[str, ...]] = tuple(COMPUTE)
    # By itself it takes MKL on Intel's processors alone.
    environments: ClassVar[tuple[dict[str, str], ...]] = ({}, {"CT2_USE_MKL": "1"})

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Convert the Hugging Face folder."""
        import transformers
        from ctranslate2.converters.transformers import GPT2Loader

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(artifact.folder)
        spec = GPT2Loader().get_model_spec(model)
        vocabulary = [str(token) for token in range(artifact.config.vocab_size)]
        spec.register_vocabulary(vocabulary)
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = vocabulary[-1]
        spec.validate()
        spec.optimize(quantization=COMPUTE[precision])
        spec.save(str(scratch))
        shape = {"block_size": artifact.config.block_size, "vocab_size": artifact.config.vocab_size}
        (scratch / "shape.json").write_text(json.dumps(shape), encoding="utf-8")

        def matrix_bytes(matrix: Any) -> float:
            return 4.0 * matrix.size if precision == "fp32" else matrix.size + 4.0 * len(matrix)

        return Prepared(scratch, weight_bytes(artifact, matrix_bytes))

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> CTranslate2Session:
        """Load the folder."""
        return CTranslate2Session(path, precision, threads)

    def text_logits(self, session: Any, tokens: Sequence[int]) -> Floats:
        """Return the logits (T, V) after each token: of the whole text at once, as it keeps no cache."""
        logits: Floats = session.forward(tokens)
        return logits


PEER = CTranslate2()
