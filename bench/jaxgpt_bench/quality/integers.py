"""`jaxgpt-bench integers`: do training in JAX and the artifact in PyTorch round to the same integers?

jaxgpt-bench integers --run QATRUN --artifact STATIC-QAT --data DATA
"""

import dataclasses
from pathlib import Path

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json


@dataclasses.dataclass(frozen=True)
class IntegersOptions:
    """Compare the integers of a quantization-aware training with those of its artifact.

    Attributes:
      run: run of `jaxgpt train --qat`.
      artifact: static-qat artifact made of it.
      data: dataset folder whose validation split is taken.
      tokens: at most.
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    run: Path
    artifact: Path
    data: Path
    tokens: int = 1024
    out: Path | None = None
    json: bool = False


def integers(options: IntegersOptions) -> Result:
    """Run `jaxgpt-bench integers`; exit code 1 when they are not the same."""
    import torch
    from jaxgpt_export.parity import open_model
    from jaxgpt_export.parity.integers import compare_integers

    from jaxgpt.shared.dataset import open_dataset, windows
    from jaxgpt_bench.common.provenance import provenance

    if options.tokens < 2:
        raise UserError(f"--tokens ({options.tokens}) must be at least 2")
    prepare_output_file(options.out)
    reference, model = open_model(options.run), open_model(options.artifact)
    block_size = reference.block_size
    assert block_size is not None
    inputs, targets = windows(open_dataset(options.data).val, block_size)
    full = inputs[(targets >= 0).all(axis=1)][: max(options.tokens // block_size, 1)]
    found = compare_integers(reference, model, torch.from_numpy(full))
    if found is None:
        raise UserError(
            f"{options.run} and {options.artifact} have no integers to compare; expected a run with --qat "
            "and its static-qat artifact"
        )
    say(f"{'pass' if found.passed else 'FAIL'}  {found}")
    figures = {
        **provenance().to_json(),
        "tokens": int(full.size),
        **dataclasses.asdict(found),
        "passed": found.passed,
    }
    if options.out is not None:
        write_json(options.out, figures)
    return Result(figures, passed=found.passed)
