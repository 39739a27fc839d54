"""`jaxgpt-bench outliers`: quantization of a model whose channels were made as unequal as large models' are.

    jaxgpt-bench outliers --artifact FP32 --data DATA

Language models grow channels whose activations are up to a hundred times the rest, and a static scale for
the whole layer then rounds the rest to nothing. Here one channel in a hundred is scaled up by 10 to 100 and
what reads it down by as much, which leaves the float function as it was:

    gain and bias of ln_1, ln_2      against the columns of c_attn, c_fc that read the channel
    value rows of c_attn             against the columns of attn.c_proj that read them

Every method then rounds both models. `naive` is static with one scale from the largest value, unsmoothed.

Source: Xiao et al. 2023, SmoothQuant, arXiv:2211.10438 (outlier channels); Dettmers et al. 2022, LLM.int8().
"""

import dataclasses
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json
from jaxgpt_bench.common.tables import Column, table

FLOAT_BOUND = 1e-4  # of the float loss; each weight is multiplied and divided once
TIMES, SLACK = 2.0, 0.002  # a method may lose so many times what it lost before, or so much
COLUMNS = (
    Column[dict[str, Any]]("method", lambda row: str(row["method"])),
    Column[dict[str, Any]]("loss, plain", lambda row: f"{row['loss_increase']:+.5f}"),
    Column[dict[str, Any]]("with outliers", lambda row: f"{row['with_outliers']:+.5f}"),
    Column[dict[str, Any]]("KL with outliers", lambda row: f"{row['kl_mean']:.1e}"),
    Column[dict[str, Any]]("stands it", lambda row: "yes" if row["stands"] else "no"),
)


@dataclasses.dataclass(frozen=True)
class OutliersOptions:
    """Scale channels without changing the model, then quantize it.

    Attributes:
      artifact: float32 artifact.
      data: dataset folder: calibration and validation text.
      tokens: of the validation split, at most.
      seed: which channels, and by how much.
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path
    data: Path
    tokens: int = 100_000
    seed: int = 0
    out: Path | None = None
    json: bool = False


def outliers(options: OutliersOptions) -> Result:
    """Run `jaxgpt-bench outliers`; exit code 1 when a method does not stand it."""
    from jaxgpt_export.format.artifact import read_certified_artifact
    from jaxgpt_export.model.build import as_arrays, as_tensors

    from jaxgpt.shared.dataset import open_dataset
    from jaxgpt_bench.common.provenance import provenance
    from jaxgpt_bench.quality.outlier_channels import measured, with_outliers

    prepare_output_file(options.out)
    artifact, dataset = read_certified_artifact(options.artifact), open_dataset(options.data)
    if artifact.quantization is not None:
        raise UserError(f"{options.artifact} is {artifact.kind}; outliers takes the float32 artifact")
    if dataset.tokenizer_sha256 != artifact.tokenizer().sha256:
        raise UserError(f"{options.data} was made with another tokenizer than {options.artifact}")
    tensors = with_outliers(artifact.config, as_tensors(artifact.tensors), options.seed)
    changed = dataclasses.replace(artifact, tensors=as_arrays(tensors))
    plain, hard = (measured(each, dataset, options.tokens) for each in (artifact, changed))
    shift = hard["float"]["loss"] - plain["float"]["loss"]
    rows = []
    for method in ("dynamic", "static", "naive"):
        before, after = plain[method]["loss_increase"], hard[method]["loss_increase"]
        stands = after <= max(TIMES * before, SLACK)
        row = {"method": method, "loss_increase": before, "with_outliers": after, "stands": stands}
        rows.append(row | {"observer": hard[method]["observer"], "kl_mean": hard[method]["kl_mean"]})
    stderr.print(table(COLUMNS, rows).terminal())
    gates = {f"float loss moves by {shift:+.1e}, at most {FLOAT_BOUND:.0e}": abs(shift) <= FLOAT_BOUND}
    gates |= {f"{row['method']} stands it": row["stands"] for row in rows[:2]}
    gates["naive static does not"] = not rows[2]["stands"]
    for text, passed in gates.items():
        say(f"{'pass' if passed else 'FAIL'}  {text}")
    figures = {
        **provenance().to_json(),
        "tokens": plain["float"]["tokens"],
        "float_loss": plain["float"]["loss"],
        "float_loss_with_outliers": hard["float"]["loss"],
        "rows": rows,
        "gates": gates,
    }
    if options.out is not None:
        write_json(options.out, figures)
    return Result(figures, passed=all(gates.values()))
