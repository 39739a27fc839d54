"""`jaxgpt-export onnx`: a float32 artifact -> a folder that ONNX Runtime runs; it needs none of this code.

    jaxgpt-export onnx --artifact ART --out FOLDER --precision float32|int8-dynamic|int8-weight-only|...
    python docs/examples/onnx_generate.py FOLDER "Once upon a time"

    model.onnx  model.onnx.data                      graph and weights; see graph.py
    config.json  generation_config.json              as in the artifact
    tokenizer.json  vocab.json  merges.txt  ...      as in the artifact
    README.md                                        what goes in and out, and what was measured

The folder is run in ONNX Runtime on the artifact's probe before it gets its name; check.py has the bounds.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, new_folder, only_writer, sha256_of

from jaxgpt_export.interchange.onnx.precision import BITS, SMALLEST_BLOCK, Precision

if TYPE_CHECKING:
    from jaxgpt_export.format.artifact import Artifact

MARKER = "model.onnx"  # by it a folder to be replaced is known
HEAD_STEP = 8  # of GroupQueryAttention
SETTINGS = ("config.json", "generation_config.json")


@dataclasses.dataclass(frozen=True)
class OnnxOptions:
    """Write a float32 artifact as an ONNX model for ONNX Runtime.

    Attributes:
      artifact: the float32 artifact, with learned positions.
      out: the folder to write.
      precision: of the matrices: float32, int8-dynamic (weights and inputs int8), int8-weight-only or
        int4-weight-only (blocks of up to 128 weights share a scale); rounded to nearest.
      overwrite: replace an earlier folder.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path
    out: Path
    precision: Precision = "float32"
    overwrite: bool = False
    json: bool = False


def onnx_command(options: OnnxOptions) -> Result:
    """Run `jaxgpt-export onnx`; exit code 1, and no folder, when the model computes something else."""
    check_replaceable(options.out, options.overwrite, MARKER, [options.artifact])
    with only_writer(options.out):
        return _export(options)


def _export(options: OnnxOptions) -> Result:
    import onnx  # noqa: F401  (what is missing is said before any work)
    import onnxruntime  # noqa: F401

    from jaxgpt_export.format.artifact import read_certified_artifact
    from jaxgpt_export.format.certificate import read_certificate
    from jaxgpt_export.format.probe import read_probe
    from jaxgpt_export.interchange.onnx.check import check_folder
    from jaxgpt_export.interchange.onnx.graph import model_bytes, write_graph
    from jaxgpt_export.interchange.onnx.readme import write_readme

    artifact, precision = read_certified_artifact(options.artifact), options.precision
    _check(artifact, precision)
    certificate, probe = read_certificate(artifact.folder), read_probe(artifact)
    tokenizer = artifact.tokenizer()
    about = {"weights_sha256": sha256_of(artifact.folder / "model.safetensors")}
    with new_folder(options.out, options.overwrite, MARKER) as folder:
        write_graph(folder, artifact.config, artifact.tensors, precision, about)
        measured, gates = check_folder(folder, artifact, precision, probe)
        passed = all(gates.values())
        if passed:
            for name in filter(lambda name: (artifact.folder / name).exists(), SETTINGS):
                shutil.copyfile(artifact.folder / name, folder / name)
            tokenizer.save(folder, artifact.config.block_size)
            write_readme(folder, artifact.config, precision, certificate["origin"], measured)
            size_mb = model_bytes(folder) / 1e6
        else:
            shutil.rmtree(folder)
    figures: dict[str, Any] = {"precision": precision, **about, **measured}
    if not passed:
        wrong = "; ".join(text for text, holds in gates.items() if not holds)
        say(f"FAIL  {options.out}: {wrong} does not hold; no folder was written")
        return Result(figures, passed=False)
    say(f"{options.out}: {precision}, {size_mb:.2f} MB; {'; '.join(gates)}")
    if precision != "float32":
        say(
            f"KL from the probe {measured['kl_mean']:.2e} mean, {measured['kl_max']:.2e} max, "
            f"top-1 agreement {measured['top1_agreement']:.4f}"
        )
    return Result({**figures, "size_mb": size_mb})


def _check(artifact: "Artifact", precision: Precision) -> None:
    """Raise UserError for what the graph does not compute."""
    config = artifact.config
    if artifact.quantization is not None:
        raise UserError(
            f"{artifact.folder} is {artifact.kind}; onnx takes the float32 artifact that it was made "
            "from, and rounds that (--precision int8-dynamic)"
        )
    if config.positions != "learned":
        raise UserError(
            f"{artifact.folder} has {config.positions} positions, the graph has learned ones; hand it "
            "on with: jaxgpt-export program"
        )
    if config.head_size % HEAD_STEP:
        raise UserError(
            f"heads of {config.head_size} channels (n_embd / n_head) are none of ONNX Runtime's attention, "
            f"which takes multiples of {HEAD_STEP}; hand it on with: jaxgpt-export program"
        )
    if precision in BITS and config.n_embd % SMALLEST_BLOCK:
        raise UserError(
            f"n_embd ({config.n_embd}) must be divisible by {SMALLEST_BLOCK} for {precision}, whose "
            "blocks of a row share a scale; take --precision int8-dynamic"
        )
