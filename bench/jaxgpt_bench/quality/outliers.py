"""`jaxgpt-bench outliers`: quantization of a model whose channels were made as unequal as large models' are.

    jaxgpt-bench outliers --artifact FP32 --data DATA

Language models grow channels whose activations are up to a hundred times the rest, and a static step for the
whole layer then rounds the rest to nothing. Here one channel in a hundred is scaled up by 10 to 100 and what
reads it down by as much, which leaves the float function as it was:

    gain and bias of ln_1, ln_2      against the columns of c_attn, c_fc that read the channel
    value rows of c_attn             against the columns of attn.c_proj that read them

Every method then rounds both models. `naive` is static with one step from the largest value, unsmoothed.

Source: Xiao et al. 2023, SmoothQuant, arXiv:2211.10438 (outlier channels); Dettmers et al. 2022, LLM.int8().
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxgpt_export.format.artifact import Artifact, Tensors, read_artifact
from jaxgpt_export.model.gpt import GPT, PARTS
from jaxgpt_export.parity.quality import Quality, batches, measure_quality
from jaxgpt_export.quantize.quantizer import Quantizer, Rounding
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.dataset import Dataset, open_dataset, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json
from jaxgpt_bench.common.provenance import provenance

SHARE = 0.01
SMALLEST, LARGEST = 10.0, 100.0
FLOAT_BOUND = 1e-4  # of the float loss; each weight is multiplied and divided once
TIMES, SLACK = 2.0, 0.002  # a method may lose so many times what it lost before, or so much


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


def with_outliers(config: ModelConfig, tensors: Tensors, seed: int) -> Tensors:
    """Return the same function with channels that are up to 100 times the rest.

    Args:
      config: shape.
      tensors: float, by module name, matrices (O, I); not changed.
      seed: which channels, and by how much.
    """
    generator = torch.Generator().manual_seed(seed)
    new, C = dict(tensors), config.n_embd

    def factors() -> Float[Tensor, "C"]:
        vector = torch.ones(C)
        chosen = torch.randperm(C, generator=generator)[: max(round(C * SHARE), 1)]
        exponent = torch.rand(len(chosen), generator=generator)
        vector[chosen] = SMALLEST * (LARGEST / SMALLEST) ** exponent
        vector[chosen[0]] = LARGEST
        return vector

    for index in range(config.n_layer):
        block = f"h.{index}"
        for norm, reader in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            vector = factors()
            for part in PARTS:
                new[f"{block}.{norm}.{part}"] = new[f"{block}.{norm}.{part}"] * vector
            new[f"{block}.{reader}.weight"] = new[f"{block}.{reader}.weight"] / vector
        vector = factors()
        for part in PARTS:
            values = new[f"{block}.attn.c_attn.{part}"].clone()
            values[2 * C :] *= vector[:, None] if part == "weight" else vector
            new[f"{block}.attn.c_attn.{part}"] = values
        new[f"{block}.attn.c_proj.weight"] = new[f"{block}.attn.c_proj.weight"] / vector
    return new


def outliers(options: OutliersOptions) -> Result:
    """Run `jaxgpt-bench outliers`; exit code 1 when a method does not stand it."""
    artifact, dataset = read_artifact(options.artifact), open_dataset(options.data)
    if artifact.quantization is not None:
        raise UserError(f"{options.artifact} is {artifact.kind}; outliers takes the float32 artifact")
    if dataset.tokenizer_sha256 != artifact.tokenizer().sha256:
        raise UserError(f"{options.data} was made with another tokenizer than {options.artifact}")
    changed = dataclasses.replace(
        artifact, tensors=with_outliers(artifact.config, artifact.tensors, options.seed)
    )
    plain, hard = (measured(each, dataset, options.tokens) for each in (artifact, changed))
    shift = hard["float"]["loss"] - plain["float"]["loss"]
    rows = []
    for method in ("dynamic", "static", "naive"):
        before, after = plain[method]["loss_increase"], hard[method]["loss_increase"]
        stands = after <= max(TIMES * before, SLACK)
        row = {"method": method, "loss_increase": before, "with_outliers": after, "stands": stands}
        rows.append(row | {"observer": hard[method]["observer"], "kl_mean": hard[method]["kl_mean"]})
    table = Table("method", "loss, plain", "with outliers", "KL with outliers", "stands it")
    for row in rows:
        cells = (f"{row['loss_increase']:+.5f}", f"{row['with_outliers']:+.5f}", f"{row['kl_mean']:.1e}")
        table.add_row(str(row["method"]), *cells, "yes" if row["stands"] else "no")
    stderr.print(table)
    gates = {f"float loss moves by {shift:+.1e}, at most {FLOAT_BOUND:.0e}": abs(shift) <= FLOAT_BOUND}
    gates |= {f"{row['method']} stands it": row["stands"] for row in rows[:2]}
    gates["naive static does not"] = not rows[2]["stands"]
    for text, passed in gates.items():
        say(f"{'pass' if passed else 'FAIL'}  {text}")
    figures = {
        **provenance(),
        "tokens": plain["float"]["tokens"],
        "float_loss": plain["float"]["loss"],
        "float_loss_with_outliers": hard["float"]["loss"],
        "rows": rows,
        "gates": gates,
    }
    if options.out is not None:
        write_json(options.out, figures)
    return Result(figures, passed=all(gates.values()))


def measured(artifact: Artifact, dataset: Dataset, tokens: int) -> dict[str, dict[str, Any]]:
    """Quantize a model by each method and measure all of them on validation text."""
    quantizer = Quantizer(artifact, dataset)
    made: dict[str, Rounding] = {method: quantizer.round(method) for method in ("dynamic", "static")}
    made["naive"] = quantizer.observed("static", "min-max")
    models: dict[str, GPT] = {"float": quantizer.reference}
    models |= {name: each.model(artifact.config) for name, each in made.items()}
    T = artifact.config.block_size
    inputs, targets = windows(dataset.val, T)
    rows = max(-(-tokens // T), 1)
    found: dict[str, Quality] = measure_quality(dict(models), batches(inputs[:rows], targets[:rows], rows=8))
    result = {}
    for name, quality in found.items():
        parity = quality.parity
        result[name] = {
            "loss": quality.loss,
            "tokens": quality.tokens,
            "loss_increase": quality.loss - found["float"].loss,
            "kl_mean": 0.0 if parity is None else parity.kl_mean,
            "observer": made[name].figures.get("calibration", {}).get("observer") if name in made else None,
        }
    return result
