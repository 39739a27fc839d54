"""`jaxgpt-bench pages`: every figure of the README and of docs/, written anew from bench/results/.

    jaxgpt-bench pages

Writes the blocks between `<!-- NAME: begin -->` and `<!-- NAME: end -->` and the README's picture. The text
around them stays as it is. Results that were measured on a busy machine are refused until --accept-noise is
given once: their files then say so.
"""

import dataclasses
from pathlib import Path

from jaxgpt.shared.console import Result, say


@dataclasses.dataclass(frozen=True)
class PagesOptions:
    """Write the tables and the picture of the README and of docs/ from committed results.

    Attributes:
      root: folder of the repository.
      accept_noise: take results of a busy machine, and say so in their files.
      json: print one JSON document with the names of the files on stdout.
    """

    root: Path = Path()
    accept_noise: bool = False
    json: bool = False


def pages(options: PagesOptions) -> Result:
    """Run `jaxgpt-bench pages`."""
    from jaxgpt.shared.files import write_atomic
    from jaxgpt_bench.common.markdown_blocks import require_markers, write_between_markers
    from jaxgpt_bench.pages.blocks import BLOCKS, PICTURES, RESULTS

    for block in BLOCKS:
        require_markers(options.root / block.page, block.marker)
    results = options.root / RESULTS
    judge_noise(results, options.accept_noise)
    contents = [(block, block.content(results)) for block in BLOCKS]
    drawn = [(options.root / path, draw(results)) for path, draw in PICTURES.items()]
    for block, content in contents:
        write_between_markers(options.root / block.page, block.marker, content)
    for path, content in drawn:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    written = sorted({*PICTURES, *(block.page for block in BLOCKS)})
    say(f"wrote {', '.join(written)}")
    return Result({"files": written})


def judge_noise(results: Path, accept: bool) -> None:
    """Refuse results of a busy machine that nobody accepted; with `accept` note in them that somebody does.

    Args:
      results: folder of the JSON files.
      accept: as --accept-noise.

    Raises:
      UserError: one was measured on a busy machine.
    """
    from jaxgpt.shared.errors import damaged
    from jaxgpt.shared.files import read_json, write_json
    from jaxgpt_bench.common.rows import Noise
    from jaxgpt_bench.noise.verdict import is_refused, noises_in, refuse

    for path in sorted(results.glob("*.json")):
        found = read_json(path, "figures")
        objects = noises_in(found)
        with damaged(path, "measure it again"):
            noises = [Noise.from_json(each) for each in objects]
        if accept and any(map(is_refused, noises)):
            for each in objects:
                each["accepted"] = True
            write_json(path, found)
        elif not accept:
            for noise in noises:
                refuse("any page", {path.name: noise})
