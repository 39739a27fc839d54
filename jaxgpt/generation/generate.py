"""One text from any session, and the options of every command that continues a prompt."""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence

from jaxgpt.generation.prompt_lookup import PromptLookup
from jaxgpt.generation.sampling import Sampler, Sampling
from jaxgpt.generation.session import Engine, RewindingEngine
from jaxgpt.generation.state import Generation, Text
from jaxgpt.shared.tokenizer import Tokenizer

BURST = 8  # tokens that an engine makes without asking back: Python between them takes 45 us each


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What every command that continues a prompt takes.

    Attributes:
      prompt: text to continue; an empty one starts a new document.
      max_new_tokens: tokens to generate at most.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest tokens whose probabilities reach p.
      seed: of the random numbers.
      stop: texts that end the generation and are not shown.
      json: print one JSON document with text and figures on stdout instead of the text.
    """

    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    json: bool = False

    def sampling(self) -> Sampling:
        """Return how tokens are drawn; UserError for a value outside its range."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def generate_shown(
    engine: Engine, tokenizer: Tokenizer, options: PromptOptions, guess: int = 0
) -> Generation:
    """Continue a prompt as a command does: the text streams to stdout, unless that is kept for JSON."""

    def show(text: str) -> None:
        if not options.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    sampling = options.sampling()
    done = generate(
        engine, tokenizer, options.prompt, options.max_new_tokens, sampling, options.stop, show, guess
    )
    show("\n")
    return done


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    on_text: Callable[[str], object] | None = None,
    guess: int = 0,
) -> Generation:
    """Continue a prompt.

    Args:
      engine: the model.
      tokenizer: as the next ones, see Text.
      prompt: see Text.
      max_new_tokens: see Text.
      sampling: see Text.
      stop: see Text.
      on_text: see Text.
      guess: tokens to try ahead at most, where the engine can rewind; the text is the same.

    Raises:
      UserError: the prompt leaves no room for a token, or max_new_tokens is below 1.
    """
    text = Text(tokenizer, prompt, engine.block_size, max_new_tokens, sampling, stop, on_text)
    rewinding = engine if isinstance(engine, RewindingEngine) else None
    lookup = PromptLookup(text.prompt, guess if rewinding else 0)
    text.push(text.sampler.draw(engine.start(text.prompt)))
    while not text.finished():
        token = text.tokens[-1]
        if rewinding is None:
            text.push(text.sampler.draw(engine.step(token)))
            continue
        lookup.push(token)
        guessed = lookup.guess(text.left - 1)
        started = time.perf_counter()
        if text.sampler.greedy and not guessed:
            most = min(text.left, BURST, lookup.patience if guess else BURST)
            drawn = rewinding.follow(token, most, tokenizer.endoftext)
        else:
            drawn = _draw_after(rewinding, text.sampler, [token, *guessed])
        kept = min(len(drawn) - 1, len(guessed))
        if kept < len(guessed):
            rewinding.truncate(len(text.prompt) + len(text.tokens) + kept)
        lookup.learn(len(guessed), kept, time.perf_counter() - started, len(drawn))
        for place, next_token in enumerate(drawn):
            if place:
                lookup.push(drawn[place - 1])
            text.push(next_token)
            if text.finished():
                break
    return text.done(lookup.guessed, lookup.accepted)


def _draw_after(engine: RewindingEngine, sampler: Sampler, tokens: Sequence[int]) -> list[int]:
    """Take a token and guesses of what follows; return the guesses that were right and the token after them.

    Each token is drawn from the logits that it would be drawn from without guesses, with a random number of
    its own.
    """
    every = len(tokens) > 1
    if sampler.greedy:
        choices: Sequence[int] = engine.greedy(tokens, every=every).tolist()
        right = (a == b for a, b in zip(choices, tokens[1:], strict=False))
        return list(choices[: 1 + sum(itertools.takewhile(bool, right))])
    drawn: list[int] = []
    for logits, guess in itertools.zip_longest(engine.forward(tokens, every=every), tokens[1:]):
        drawn.append(sampler.draw(logits))
        if drawn[-1] != guess:
            break
    return drawn
