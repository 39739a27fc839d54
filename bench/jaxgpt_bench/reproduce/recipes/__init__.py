"""What `jaxgpt-bench reproduce` does on each size of machine: data, model, training, amounts measured."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError, nearest

HUB_SOURCE = "hub:flytech/python-codes-25k"  # what the earlier project was trained on
PACKAGES = (
    "packages:torch,transformers,jax,flax,optax,orbax,numpy,datasets,scipy,pandas,sympy,networkx,matplotlib"
)
# Packages with many functions; one that is not installed is named before all else.
ANSWERS_PACKAGES = Path(__file__).with_name("answers-packages.txt")
# Of packages: what is written for readers, and what of it is lists.
DOCUMENTATION = ("*.md", "*.rst")
_LISTS = "LICEN licen AUTHORS authors CHANGE change HISTORY history NEWS news"
NOT_PROSE = tuple(f"*{word}*{ending}" for word in _LISTS.split() for ending in (".md", ".rst"))


def packages_source(requirements: str) -> str:
    """Return the source of a file of requirements, whose lines have importable names behind a #."""
    lines = (line for line in requirements.splitlines() if not line.startswith("##"))
    names = (line.partition("#")[2].strip() for line in lines)
    return "packages:" + ",".join(name for name in names if name)


# Muon as `small` had it when the reference model was measured, whose figures are committed.
FIRST_MUON = {"beta1": 0.9, "decay_fraction": 1.0, "momentum_warmup_steps": 0, "split_qkv": False}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One size of the experiment.

    Attributes:
      about: how long it takes, and what for, in a line; the one place that says so.
      offline_source: text where the hub can't be reached.
      tokenizer: of `jaxgpt prepare`.
      val_fraction: of `jaxgpt prepare`.
      train: options of `jaxgpt train`, the preset among them.
      qat: options of the quantization-aware training that goes on from it; None leaves it out.
      answers: the text is made of requests and programs, those of `jaxgpt-bench evaluate` left out; they are
        asked at the end. The loss counts programs alone, if `train` has no prompt_loss_weight.
      sampling: options of `jaxgpt-export convert`: how tokens are drawn where nobody says otherwise.
      files: which files of packages are read; options of `jaxgpt prepare`.
      fits_device: batches are cut into the largest micro-batches that fit the device, with remat where only
        that fits.
      quality_tokens: of the validation split; 0 for all.
      parse_samples: texts whose share that parses is measured, for each model.
      parse_tokens: their length at most.
      tokens: to generate for speed.
      sample_tokens: of the fixed prompts' samples at most.
      rounds: of the speed measurement.
    """

    about: str
    offline_source: str
    tokenizer: str
    val_fraction: float
    train: Mapping[str, Any]
    qat: Mapping[str, Any] | None
    answers: bool = False
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fits_device: bool = False
    quality_tokens: int = 131_072
    parse_samples: int = 24
    parse_tokens: int = 200
    tokens: int = 250
    sample_tokens: int = 250
    rounds: int = 5


RECIPES = {
    "smoke": Recipe(
        about="five minutes on two cores; shows that everything runs, not what a model can do",
        offline_source="stdlib",
        tokenizer="bpe:2048",
        val_fraction=0.08,
        train={"preset": "tiny", "max_steps": 200, "eval_every": 200, "checkpoint_every": 100,
               "sample_every": 0},
        qat={"preset": "tiny", "max_steps": 20, "learning_rate": 0.002, "embedding_learning_rate": 0.002,
             "warmup_steps": 2, "eval_every": 20, "checkpoint_every": 20, "sample_every": 0},
        quality_tokens=16_384,
    ),
    "cpu": Recipe(
        about="one to two hours on two cores: the reference model, 5.9 million parameters",
        offline_source=PACKAGES,
        tokenizer="bpe:4096",
        val_fraction=0.04,
        train={"preset": "small", "n_layer": 6, "n_head": 4, "n_embd": 256, "batch_size": 8,
               "max_steps": 2400, "learning_rate": 0.02, "embedding_learning_rate": 0.01,
               "warmup_steps": 60, "eval_every": 1200, "checkpoint_every": 200, "sample_every": 1200,
               **FIRST_MUON},
        qat={**FIRST_MUON, "preset": "small", "batch_size": 8, "max_steps": 200, "learning_rate": 0.002,
             "embedding_learning_rate": 0.0005, "warmup_steps": 20, "eval_every": 200,
             "checkpoint_every": 100, "sample_every": 0},
    ),
    # 11.5 M tokens, 3.1 times.
    "answers": Recipe(
        about="one to two and a half hours on two cores: trained on requests with programs, and asked "
        "others; 3.7 million parameters",
        offline_source=packages_source(ANSWERS_PACKAGES.read_text(encoding="utf-8")),
        tokenizer="bpe:2048",
        val_fraction=0.02,
        train={"preset": "small", "n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256,
               "batch_size": 16, "max_steps": 8600, "learning_rate": 0.02, "embedding_learning_rate": 0.01,
               "warmup_steps": 60, "eval_every": 2150, "checkpoint_every": 100, "sample_every": 0},
        qat=None,
        answers=True,
    ),
    # The text of `answers` and what is written for readers. Of requests a tenth of the tokens counts: half of
    # them have invented words, which nothing can be learned of. How tokens are drawn was chosen on held-out
    # docstrings: of what repeats no four tokens more than four times, what fits most names (docs/LOG.md).
    "mixed": Recipe(
        about="one to two hours on two cores: trained on requests with programs and on documentation, "
        "and asked others; 3.7 million parameters",
        offline_source=packages_source(ANSWERS_PACKAGES.read_text(encoding="utf-8")),
        tokenizer="bpe:2048",
        val_fraction=0.02,
        train={"preset": "small", "n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256,
               "batch_size": 16, "max_steps": 4000, "learning_rate": 0.02, "embedding_learning_rate": 0.01,
               "warmup_steps": 60, "eval_every": 1000, "checkpoint_every": 100, "sample_every": 0,
               "prompt_loss_weight": 0.1},
        qat=None,
        answers=True,
        sampling={"temperature": 0.2, "repetition_penalty": 1.2, "no_repeat_ngram_size": 5},
        files={"include": ("*.py", *DOCUMENTATION), "exclude": NOT_PROSE, "skip_errors": True},
    ),
    # The earlier project's size. A T4 has no bfloat16 units and takes float16; newer GPUs take bfloat16, and
    # cuDNN's attention, as no attention weight is dropped.
    "gpu": Recipe(
        about="GPT-2 with 124 million parameters and its own tokenizer, on every GPU of one host",
        offline_source=PACKAGES,
        tokenizer="gpt2",
        val_fraction=0.04,
        train={"preset": "gpt2", "batch_size": 128, "grad_accum_steps": 8, "dropout": 0.1,
               "attn_dropout": 0.0, "max_steps": 1000, "eval_every": 100, "checkpoint_every": 100,
               "sample_every": 500},
        qat={"preset": "gpt2", "batch_size": 32, "grad_accum_steps": 2, "max_steps": 200,
             "optimizer": "adamw", "learning_rate": 1e-5, "embedding_learning_rate": 1e-5, "warmup_steps": 20,
             "eval_every": 200, "checkpoint_every": 100, "sample_every": 0},
        fits_device=True,
        rounds=3,
    ),
}  # fmt: skip


def find_recipe(name: str, max_steps: int | None) -> Recipe:
    """Return a recipe, with another number of steps where one is given.

    Raises:
      UserError: there is none of that name, which is then answered with the nearest.
    """
    if name not in RECIPES:
        raise UserError(f"reproduce has no preset {name!r}; {nearest(name, RECIPES)}")
    recipe = RECIPES[name]
    if max_steps is None:
        return recipe
    if max_steps < 1:
        raise UserError(f"--max-steps ({max_steps}) must be at least 1")
    return dataclasses.replace(recipe, train={**recipe.train, "max_steps": max_steps})
