"""`jaxgpt-export program`: an artifact -> one torch.export program; it needs PyTorch and none of this code.

    jaxgpt-export program --artifact ART --out FILE.pt2
    logits = torch.export.load(FILE.pt2).module()(tokens)    (B, T) int64 -> (B, T, V), T <= block_size

The file is read back and compared before it gets its name; torch_export.py says what is in it.
"""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.files import check_new_file, new_file, sha256_of

# The program calls the operators that the module calls, so the logits are equal bit for bit here. Where a
# PyTorch fuses a float operator differently, float32 logits of size 10 move by 1e-6; a wrong layer by 1e-1.
MAX_PROGRAM_DIFF = 1e-5


@dataclasses.dataclass(frozen=True)
class ProgramOptions:
    """Write an artifact as a torch.export program.

    Attributes:
      artifact: the artifact folder, float32 or quantized.
      out: the file to write, NAME.pt2.
      overwrite: replace an earlier file.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path
    out: Path
    overwrite: bool = False
    json: bool = False


def program_command(options: ProgramOptions) -> Result:
    """Run `jaxgpt-export program`; exit code 1, and no file, when the program computes something else."""
    import numpy as np
    import torch

    from jaxgpt_export.format.artifact import read_certified_artifact
    from jaxgpt_export.format.probe import read_probe
    from jaxgpt_export.interchange.torch_export import exported, largest_difference
    from jaxgpt_export.model.build import build_model

    check_new_file(options.out, options.overwrite, ".pt2")
    artifact = read_certified_artifact(options.artifact)
    probe = read_probe(artifact)
    model = build_model(artifact)
    weights = artifact.folder / "model.safetensors"
    about = {"kind": artifact.kind, "artifact": str(artifact.folder), "weights_sha256": sha256_of(weights)}
    half = [
        name.removesuffix(".weight")
        for name, tensor in artifact.tensors.items()
        if tensor.dtype == np.float16 and name.endswith(".weight")
    ]
    content = io.BytesIO()  # PyTorch's writer ends the process when a file can't take it
    torch.export.save(exported(model, half), content, extra_files={"artifact.json": json.dumps(about)})
    with new_file(options.out) as path:
        path.write_bytes(content.getbuffer())
        with path.open("rb") as file:
            program = torch.export.load(file).module()
        difference = largest_difference(model, program, torch.from_numpy(probe.tokens))
        passed = difference <= MAX_PROGRAM_DIFF
        if not passed:
            path.unlink()
    figures: dict[str, Any] = {**about, "max_abs_logit_diff": difference}
    text = f"logits of the program and of the module differ by at most {difference:.2e}"
    if not passed:
        say(f"FAIL  {text}, {MAX_PROGRAM_DIFF:.0e} is allowed; no file was written")
        return Result(figures, passed=False)
    size = options.out.stat().st_size
    say(f"{options.out}: {artifact.kind}, {size / 1e6:.2f} MB; {text}")
    return Result({**figures, "size_mb": size / 1e6})
