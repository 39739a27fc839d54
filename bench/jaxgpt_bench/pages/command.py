"""`jaxgpt-bench pages`: every figure of the README and of docs/, written anew from bench/results/.

    jaxgpt-bench pages

Writes the blocks between `<!-- NAME: begin -->` and `<!-- NAME: end -->` and the README's picture. The text
around them stays as it is.
"""

import dataclasses
from pathlib import Path

from jaxgpt.shared.console import Result, say


@dataclasses.dataclass(frozen=True)
class PagesOptions:
    """Write the tables and the picture of the README and of docs/ from committed results.

    Attributes:
      root: folder of the repository.
      json: print one JSON document with the names of the files on stdout.
    """

    root: Path = Path()
    json: bool = False


def pages(options: PagesOptions) -> Result:
    """Run `jaxgpt-bench pages`."""
    from jaxgpt.shared.files import write_atomic
    from jaxgpt_bench.common.markdown_blocks import require_markers, write_between_markers
    from jaxgpt_bench.pages.blocks import BLOCKS, PICTURES, RESULTS

    for block in BLOCKS:
        require_markers(options.root / block.page, block.marker)
    results = options.root / RESULTS
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
