"""The ways to generate that `jaxgpt-bench native` times, in turns."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.native.native_model import NativeModel
from jaxgpt_export.native.native_session import NativeSession

from jaxgpt.generation.generate import decode_steps
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.session import Session
from jaxgpt.generation.state import Generation, GenerationState
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt_bench.common.bandwidth import read_bandwidth
from jaxgpt_bench.common.rows import Spread
from jaxgpt_bench.common.timing import timed_generation
from jaxgpt_bench.peers.transformers_ import TransformersSession

GREEDY = Sampling(temperature=0.0)
# Keys of the JSON. Drafts are timed beside the same texts `without_guess`: those may end before the others,
# whose loop takes every token that it is asked for.
WAYS = ("plain", "screen", "guess", "without_guess", "batch", "original_way")


@dataclasses.dataclass
class Counts:
    """What is counted over all rounds.

    Attributes:
      same: by way, whether it wrote the tokens of plain steps.
      exact_outputs: that the head's screen had computed exactly.
      characters: by way, of its texts.
      tokens: by way, of its texts.
      drafted: tokens.
      accepted: of them.
    """

    same: dict[str, bool] = dataclasses.field(
        default_factory=lambda: {"screen": True, "guess": True, "batch": True}
    )
    exact_outputs: int = 0
    characters: dict[str, int] = dataclasses.field(default_factory=lambda: {"plain": 0, "guess": 0})
    tokens: dict[str, int] = dataclasses.field(default_factory=lambda: {"plain": 0, "guess": 0})
    drafted: int = 0
    accepted: int = 0

    def add_text(self, way: str, tokens: Sequence[int], tokenizer: Tokenizer) -> None:
        """Count a text."""
        self.tokens[way] += len(tokens)
        self.characters[way] += len(tokenizer.decode(tokens))


class NativeRounds:
    """Sessions of one model, each a way to generate, and the earlier project's way beside them.

    Args:
      model: packed.
      reference: the float32 artifact, for the earlier project's way.
      tokenizer: of both.
      prompts: continued in every round.
      count: tokens to generate for each.
      texts: side by side in a batch.
      draft_tokens: tokens that are drafted at most.
      threads: CPU threads.
    """

    def __init__(
        self,
        model: NativeModel,
        reference: Artifact,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        count: int,
        texts: int,
        draft_tokens: int,
        threads: int,
    ) -> None:
        self._model, self._tokenizer, self._prompts, self._count = model, tokenizer, prompts, count
        self._texts, self._draft_tokens, self._threads = texts, draft_tokens, threads
        self._plain, self._screened = NativeSession(model), NativeSession(model)
        self._many = NativeSession(model, slots=texts)
        self._plain.use_screen(False)
        self._many.use_screen(False)
        torch.set_num_threads(threads)
        self._earlier = TransformersSession(str(reference.folder), cached=False, every_logit=True)
        self._rates: dict[str, list[float]] = {name: [] for name in WAYS}
        self._counts = Counts()

    def measure(self, rounds: int) -> dict[str, Any]:
        """Run so many rounds; return their figures."""
        bandwidths: list[float] = []
        for _ in range(rounds):
            taken = timed_generation(self._earlier, self._prompts[0], self._count)["decode_s"]
            self._rates["original_way"].append((self._count - 1) / taken)
            bandwidths.append(read_bandwidth(self._model.bytes_per_token, self._threads))
            self._one_text_at_a_time()
            self._texts_side_by_side()
        return {
            "rounds": rounds,
            "bandwidth_gb_s": bandwidths,
            "bytes_per_token": self._model.bytes_per_token,
            **self._figures(rounds),
            "ceiling": self._ceiling(bandwidths),
        }

    def _ceiling(self, bandwidths: Sequence[float]) -> dict[str, Any]:
        """Set plain steps beside what the bandwidth of the same round allows."""
        ceilings = [value * 1e9 / self._model.bytes_per_token for value in bandwidths]
        shares = [rate / ceiling for rate, ceiling in zip(self._rates["plain"], ceilings, strict=True)]
        return {"tokens_per_s": Spread.of(ceilings).to_json(), "share": Spread.of(shares).to_json()}

    def _one_text_at_a_time(self) -> None:
        """Time plain steps, the screen, and drafts on every prompt."""
        counts = self._counts
        seconds = dict.fromkeys(("plain", "screen"), 0.0)
        drafted: list[list[Generation]] = []
        for prompt in self._prompts:
            expected = timed_generation(self._plain, prompt, self._count)
            seconds["plain"] += expected["decode_s"]
            counts.add_text("plain", expected["tokens"], self._tokenizer)
            self._screened.use_screen(True)  # also where it was given up for the text before
            before = self._screened.exact_outputs
            found = timed_generation(self._screened, prompt, self._count)
            seconds["screen"] += found["decode_s"]
            counts.exact_outputs += self._screened.exact_outputs - before
            counts.same["screen"] &= found["tokens"] == expected["tokens"]
            drafted.append(self._drafted(prompt))
        for name, taken in seconds.items():
            self._rates[name].append(len(self._prompts) * (self._count - 1) / taken)
        for name, texts in zip(("without_guess", "guess"), zip(*drafted, strict=True), strict=True):
            self._rates[name].append(rate_of(texts))

    def _drafted(self, prompt: Sequence[int]) -> list[Generation]:
        """Continue a prompt without and with drafts, to the same end."""
        found = []
        for draft_tokens in (0, self._draft_tokens):
            self._screened.use_screen(True)
            found.append(continued(self._screened, self._tokenizer, prompt, self._count, draft_tokens))
        without, done = found
        self._counts.same["guess"] &= done.tokens == without.tokens
        self._counts.drafted += done.guessed
        self._counts.accepted += done.accepted
        self._counts.add_text("guess", done.tokens, self._tokenizer)
        return found

    def _texts_side_by_side(self) -> None:
        """Time the same text in every slot."""
        texts = self._texts
        expected = timed_generation(self._plain, self._prompts[0], self._count)["tokens"]
        columns, taken = timed_batch(self._many, self._prompts[0], self._count, texts)
        self._counts.same["batch"] &= all(column == expected for column in columns)
        self._rates["batch"].append(texts * (self._count - 1) / taken)

    def _ratios(self, name: str, base: str) -> list[float]:
        return [a / b for a, b in zip(self._rates[name], self._rates[base], strict=True)]

    def _ratio(self, name: str, base: str) -> float:
        return statistics.median(self._ratios(name, base))

    def _figures(self, rounds: int) -> dict[str, Any]:
        counts = self._counts
        generated = rounds * len(self._prompts) * self._count
        long = {way: counts.characters[way] / counts.tokens[way] for way in counts.tokens}
        # By whose texts; float32 writes others, a batch one of them alone.
        texts = {"plain": "plain", "screen": "plain", "guess": "guess"}
        drafts, screens = self._ratios("guess", "without_guess"), self._ratios("screen", "plain")
        return {
            "tokens_per_s": {name: Spread.of(values).to_json() for name, values in self._rates.items()},
            "characters_per_s": {
                name: Spread.of([long[text] * rate for rate in self._rates[name]]).to_json()
                for name, text in texts.items()
            },
            "screen": {
                "used": counts.exact_outputs > 0,
                "times_plain": self._ratio("screen", "plain"),
                "same_tokens": counts.same["screen"],
                "exact_outputs_per_step": counts.exact_outputs / generated,
            },
            "guess": {
                "times_plain": statistics.median(a * b for a, b in zip(drafts, screens, strict=True)),
                "times_screened": statistics.median(drafts),
                "same_tokens": counts.same["guess"],
                "guessed": counts.drafted,
                "accepted": counts.accepted,
            },
            "batch": {
                "texts": self._texts,
                "times_plain": self._ratio("batch", "plain"),
                "same_tokens": counts.same["batch"],
            },
            "original_way": {f"{name}_times_it": self._ratio(name, "original_way") for name in WAYS[:3]},
        }


def continued(
    session: Session, tokenizer: Tokenizer, prompt: Sequence[int], count: int, draft_tokens: int
) -> Generation:
    """Continue the tokens of a prompt as `generate` does, which ends with the document.

    Args:
      session: the model.
      tokenizer: of the model.
      prompt: tokens, taken as they are: those of a text that was cut anywhere may be others once it is
        decoded.
      count: tokens to generate at most.
      draft_tokens: tokens that are drafted at most; 0 for none.
    """
    state = GenerationState(tokenizer, prompt, session.block_size, count, GREEDY)
    for _ in decode_steps(session, state, draft_tokens):
        pass
    return state.result()


def rate_of(texts: Sequence[Generation]) -> float:
    """Return tokens a second, the first token of each text left out."""
    return max(sum(len(text.tokens) - 1 for text in texts), 1) / sum(text.decode_s for text in texts)


def timed_batch(
    session: NativeSession, prompt: list[int], count: int, texts: int
) -> tuple[list[list[int]], float]:
    """Generate the same text in every slot; return all, and the seconds of all but the first tokens."""
    for slot in range(texts):
        session.truncate(0, slot)
    slots = list(range(texts))
    rows = [session.greedy(prompt * texts, [slot for slot in slots for _ in prompt])]
    started = time.perf_counter()
    while len(rows) < count:
        rows.append(session.greedy(rows[-1].tolist(), slots))
    return np.stack(rows, axis=1).tolist(), time.perf_counter() - started
