"""Prompts, what models write after them, how held-out documents go on, and what of it parses."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt.generation.generate import generate
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.session import Session
from jaxgpt.shared.dataset import Tokens
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt_bench.common.rows import ParseCount, WrittenText
from jaxgpt_bench.quality.contestants import ComparedModel
from jaxgpt_bench.sandbox.programs import FENCE, parses

CODE_BEGIN = "```python\n"
SAMPLE_TEMPERATURE = 0.7

# Fixed prompts. The first is the earlier project's; the others were written down before any model was asked.
FIXED_PROMPTS = (
    "Python program to calculate the average",
    "Write a function to reverse a string",
    "Read a CSV file and print its rows",
    "Return the largest value of a list",
    "Check whether a number is prime",
    "Sort a list of dictionaries by a key",
)
SEED = 0
TEMPERATURES = (0.0, 0.8)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The beginning of a validation document, and how the document goes on, up to the closing fence."""

    text: str
    rest: str


def spread_evenly(total: int, count: int) -> npt.NDArray[np.int64]:
    """Choose so many of 0 ... total - 1, first and last among them; all where there are fewer."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def sample_prompts(texts: Sequence[str], tokenizer: Tokenizer, count: int, longest: int) -> list[Prompt]:
    """Return prompts from documents evenly spread: all up to the code, where there is a fence.

    Args:
      texts: the validation documents; those with a fence alone, where there are enough of them.
      tokenizer: of the models.
      count: how many are wanted; fewer where fewer documents fit.
      longest: tokens a prompt may have; documents with a longer one are passed over.
    """
    found: list[Prompt] = []
    for text in texts:
        head, fence, rest = text.partition(CODE_BEGIN)
        if not fence:
            tokens = tokenizer.encode(text, special=True)
            head, rest = tokenizer.decode(tokens[: longest // 2]), tokenizer.decode(tokens[longest // 2 :])
        if len(tokenizer.encode(head + fence, special=True)) <= longest:
            found.append(Prompt(head + fence, rest.partition(FENCE)[0]))
    fenced = [prompt for prompt in found if prompt.text.endswith(CODE_BEGIN)]
    found = fenced if len(fenced) >= count else found
    return [found[index] for index in spread_evenly(len(found), count)]


def val_documents(val: Tokens, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the validation split."""
    ends = np.flatnonzero(val == tokenizer.endoftext)
    pairs = itertools.pairwise(ends)
    return [tokenizer.decode(val[start + 1 : end].tolist()) for start, end in pairs]


def sample_texts(
    session: Session, tokenizer: Tokenizer, prompts: Sequence[str], sample_tokens: int
) -> Iterator[WrittenText]:
    """Continue each prompt up to the closing fence; the seed is the prompt's number."""
    for seed, prompt in enumerate(prompts):
        sampling = Sampling(temperature=SAMPLE_TEMPERATURE, seed=seed)
        done = generate(session, tokenizer, prompt, sample_tokens, sampling, stop=[FENCE])
        yield WrittenText(text=done.text, finish_reason=done.finish_reason, parses=parses(done.text))


def held_out_texts(prompts: Sequence[Prompt], tokenizer: Tokenizer, longest: int) -> list[WrittenText]:
    """Return how the prompts' documents go on themselves, cut where a sample would be."""
    texts = []
    for prompt in prompts:
        tokens = tokenizer.encode(prompt.rest, special=True)
        text = tokenizer.decode(tokens[:longest])
        finish_reason = "length" if len(tokens) > longest else "stop"
        texts.append(WrittenText(text=text, finish_reason=finish_reason, parses=parses(text)))
    return texts


def parse_count(texts: Sequence[WrittenText]) -> ParseCount:
    """Count the texts, those that parse and those that ended at the length limit."""
    return ParseCount(
        texts=len(texts),
        parse=sum(text.parses for text in texts),
        cut=sum(text.finish_reason == "length" for text in texts),
    )


def fixed_samples(models: Sequence[ComparedModel], tokenizer: Tokenizer, tokens: int) -> dict[str, Any]:
    """Continue every fixed prompt with every model, greedily and by chance, each with the same seed.

    Args:
      models: that write.
      tokenizer: of the models.
      tokens: of a text at most; it ends earlier with the document.
    """
    rows = []
    for prompt, temperature, model in itertools.product(FIXED_PROMPTS, TEMPERATURES, models):
        assert model.session is not None
        done = generate(model.session, tokenizer, prompt, tokens, Sampling(temperature, seed=SEED))
        rows.append(
            {
                "prompt": prompt,
                "temperature": temperature,
                "model": model.name,
                "text": done.text,
                "tokens": [token for token in done.tokens if token != tokenizer.endoftext],
                "finish_reason": done.finish_reason,
            }
        )
    return {"seed": SEED, "longest": tokens, "samples": rows}
