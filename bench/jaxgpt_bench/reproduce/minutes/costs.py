"""What the stages after the training cost, from two speeds that were measured: a forward pass, a token.

Rough: a stage is so many seconds to load and save, and so many tokens that pass through a PyTorch module. The
factors are those of stages that were timed. What is measured is cut down to the time there is, by one scale.
"""

import dataclasses
import math
from collections.abc import Sequence

from jaxgpt_bench.evaluate.command import LONGEST, EvaluateOptions
from jaxgpt_bench.evaluate.requests import REQUESTS
from jaxgpt_bench.reproduce.minutes.probe import CpuSpeed
from jaxgpt_bench.reproduce.recipes import Recipe

SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625)  # of a recipe's amounts
LEAST = {"quality_tokens": 4096, "parse_samples": 6, "parse_tokens": 64, "sample_tokens": 80, "tokens": 64,
         "rounds": 1}  # fmt: skip

FIXED_S = 6.0  # to open and write models, whatever their size
CONVERT_TOKENS = 6_000  # through a module: probe, rounded and not, and verify again
QUANTIZE_TOKENS = 60_000  # calibration on 8,192, the certificate's loss of two models on 16,384, verify
QUALITY_FACTOR = 2.0  # times a forward: logits of all positions, and their distances in float64
DECODE_FACTOR = 1.2  # times a float32 token: choosing tokens, a method that is slower
FIXED_SAMPLES = 12  # fixed prompts, greedy and by chance, of two models
SPEED_ROWS, UNCACHED_ROWS = 14, 2  # programs with a cache, and without, that are measured
SPEED_LOAD_S = 4.0  # to start a program
PROMPT_TOKENS, PREFILLED_TOKENS = 16, 512  # of the speed measurement
LOOKED_UP_S = 1.2e-6  # of a training token on one core, to look its runs up
LOOKING_CORES = 8  # that this uses at most

DRAWS = 5  # times that each request is answered by chance, and once greedily: one draw of 20 says little
ANSWERING_MODELS = 2  # float32 and INT8

STAGES = ("convert", "quantize", "quality", "samples", "answers", "other-text", "memorization", "speed",
          "report")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much is measured: fields of a recipe.

    Attributes:
      quality_tokens: of the validation split.
      parse_samples: texts whose share that parses is counted, for each model.
      parse_tokens: their length at most.
      sample_tokens: length of the fixed prompts' samples at most.
      tokens: that the speed measurement generates.
      rounds: of it.
    """

    quality_tokens: int
    parse_samples: int
    parse_tokens: int
    sample_tokens: int
    tokens: int
    rounds: int

    @classmethod
    def of(cls, recipe: Recipe, scale: float = 1.0) -> "Amounts":
        """Return a recipe's amounts, times a scale, never below LEAST (or what the recipe has)."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: _scaled(getattr(recipe, name), LEAST[name], scale) for name in names})


def _scaled(amount: int, least: int, scale: float) -> int:
    return max(round(amount * scale), min(least, amount))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What the costs of stages depend on.

    Attributes:
      cpu: speed of the float32 module.
      block_size: context, tokens.
      train_tokens: of the data set.
      val_tokens: of the data set.
      methods: quantizations.
      conversions: 1, or 2 with a quantization-aware training.
      other_tokens: of the texts from elsewhere, about.
      answers: requests and held-out docstrings are answered.
    """

    cpu: CpuSpeed
    block_size: int
    train_tokens: int
    val_tokens: int
    methods: int
    conversions: int
    other_tokens: int
    answers: bool = False

    def seconds(self, amounts: Amounts) -> dict[str, float]:
        """Return the seconds of each stage after the training; conversions and methods all together."""
        models = self.methods + self.conversions
        a_token, decode = self.cpu.forward_s / self.block_size, self.cpu.decode_s
        measured = min(amounts.quality_tokens, self.val_tokens) * a_token * QUALITY_FACTOR * models
        written = models * amounts.parse_samples * amounts.parse_tokens * decode * DECODE_FACTOR
        context = PROMPT_TOKENS + amounts.tokens / 2  # that a token without a cache computes again
        uncached = UNCACHED_ROWS * amounts.tokens * context * a_token
        a_round = SPEED_ROWS * (amounts.tokens * decode + PREFILLED_TOKENS * a_token) + uncached
        looked_up = self.train_tokens * LOOKED_UP_S / min(self.cpu.cores, LOOKING_CORES)
        asked = (len(REQUESTS) + EvaluateOptions.texts) * (DRAWS + 1) if self.answers else 0
        answered = ANSWERING_MODELS * asked * LONGEST * decode * DECODE_FACTOR
        other = models * self.other_tokens * a_token * QUALITY_FACTOR
        return {
            "convert": self.conversions * (2 * FIXED_S + CONVERT_TOKENS * a_token),
            "quantize": self.methods * (2 * FIXED_S + QUANTIZE_TOKENS * a_token),
            "quality": FIXED_S + measured + written,
            "samples": FIXED_S + 2 * FIXED_SAMPLES * amounts.sample_tokens * decode * DECODE_FACTOR,
            "answers": FIXED_S + answered if answered else 0.0,
            "other-text": FIXED_S + other if other else 0.0,
            "memorization": FIXED_S + looked_up,
            # A round before those that count, in which each program's environment is chosen.
            "speed": SPEED_LOAD_S * (SPEED_ROWS + UNCACHED_ROWS) + a_round * (1 + amounts.rounds),
            "report": FIXED_S,
        }

    def fitting(self, recipe: Recipe, seconds: float, stages: Sequence[str] = STAGES) -> Amounts:
        """Return the largest amounts with which some stages fit into so many seconds; else the least."""
        for scale in SCALES:
            amounts = Amounts.of(recipe, scale)
            found = self.seconds(amounts)
            if math.fsum(found[stage] for stage in stages) <= seconds:
                return amounts
        return amounts
