"""What `jaxgpt-bench serving` is told."""

import dataclasses
from pathlib import Path

from jaxgpt.shared.errors import UserError

OTHER_END = 8  # tokens that a long prompt ends with when it comes again
TIMES_LONGER = 4  # are the texts beside which long prompts arrive

SERVED = "int8-dynamic"  # of a preset's random weights
SLOTS = 16  # texts that a server runs side by side


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """Measure clients against servers: tokens/s of all, time to first token, time between tokens.

    Attributes:
      artifact: that our server serves.
      preset: serve random weights of this preset's shape instead, int8-dynamic.
      llama_server: llama.cpp's program llama-server, which is started with the same weights as Q8_0.
      parent: float32 artifact that --artifact was quantized from, of which those weights are made.
      url: other servers that run already, each NAME=ADDRESS.
      clients: numbers of clients.
      temperature: of the texts; each is measured.
      tokens: of a text.
      prompt_tokens: of a text's prompt.
      shared_tokens: with which all prompts of a round begin in a further measurement; 0 leaves it out, a
        shorter context bounds it.
      long_prompt: tokens of a long prompt; 0 leaves long prompts out, a shorter context bounds it.
      requests: of each client in a round.
      rounds: each measures everything once.
      seed: of the prompts.
      accept_noise: take the figures for tables however busy the machine is; the JSON file says so.
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path | None = None
    preset: str | None = None
    llama_server: Path | None = None
    parent: Path | None = None
    url: tuple[str, ...] = ()
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    temperature: tuple[float, ...] = (0.0, 0.8)
    tokens: int = 128
    prompt_tokens: int = 16
    shared_tokens: int = 256
    long_prompt: int = 512
    requests: int = 2
    rounds: int = 3
    seed: int = 0
    accept_noise: bool = False
    out: Path | None = None
    json: bool = False

    def fitted(self, context: int) -> "ServingOptions":
        """Return the options with what a context bounds: tokens shared, and of a long prompt.

        Args:
          context: of the model, in tokens.

        Raises:
          UserError: not even a text and its prompt fit.
        """
        beside = context - self.prompt_tokens - self.tokens
        if beside < 0:
            raise UserError(
                f"--prompt-tokens {self.prompt_tokens} and --tokens {self.tokens} do not fit the model's "
                f"context of {context}; give fewer"
            )
        shared, long = min(self.shared_tokens, beside), min(self.long_prompt, context - OTHER_END - 2)
        return dataclasses.replace(self, shared_tokens=shared, long_prompt=long)
