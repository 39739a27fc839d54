"""What `jaxgpt-bench recipe` may be told."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """Measure how many steps each change of the training recipe saves.

    Attributes:
      data: dataset folder of `jaxgpt prepare`.
      out: JSON file of the figures; trainings that it holds are not taken again.
      shape: 1m (4 layers of 128 channels, a context of 128) or 6m (6 layers of 256, a context of 512).
      rows: names of the table's rows; all of the shape if not given. adamw-trials and muon-trials are those
        that the two were tuned by.
      seeds: of initialization and data order.
      lengths: numbers of steps, instead of each row's own.
      jobs: trainings at a time, a core each.
      json: print one JSON document with all figures on stdout.
    """

    data: Path
    out: Path
    shape: Literal["1m", "6m"] = "1m"
    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    lengths: tuple[int, ...] = ()
    jobs: int = 2
    json: bool = False
