"""`jaxgpt-export convert`: a run -> the float32 artifact. The only module that knows JAX and PyTorch.

    jaxgpt-export convert --run runs/demo/run --out runs/demo/fp32

Names are a table, layouts agree (Flax kernels and Hugging Face's Conv1D are both (I, O)), so nothing is
folded or transposed; the certificate says how far the module's logits are from Flax's. A run with `qat` gives
its float weights, and in qat.safetensors its input steps with the logits that it computed, rounded.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.files import check_replaceable, new_folder, sha256_of
from jaxgpt.training.model.fake_quant import without_scales
from jaxgpt.training.run.checkpoints import load_params
from jaxgpt.training.run.folder import check_tokenizer, open_run
from safetensors.torch import save_file

from jaxgpt_export.flax_run.logits import all_flax_logits
from jaxgpt_export.flax_run.tensors import hf_tensors, input_scales
from jaxgpt_export.format.artifact import from_hf_layout, from_hf_name, write_artifact
from jaxgpt_export.format.certificate import TRAINED_FILE, versions, write_certificate
from jaxgpt_export.format.probe import Probe, probe_positions, probe_tokens, write_probe
from jaxgpt_export.model.gpt import float_model
from jaxgpt_export.parity import ParityMeter
from jaxgpt_export.parity.probe_gates import MAX_FP32_LOGIT_DIFF


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Turn a run's checkpoint into a float32 artifact, a Hugging Face GPT-2 folder with a certificate.

    Attributes:
      run: the run folder.
      out: the artifact folder to write.
      step: best, latest, or a stored step.
      data: dataset folder whose validation split is compared on; the run's own if not given.
      overwrite: replace an earlier artifact.
      json: print one JSON document with all figures on stdout.
    """

    run: Path
    out: Path
    step: str = "best"
    data: Path | None = None
    overwrite: bool = False
    json: bool = False


def convert(options: ConvertOptions) -> Result:
    """Run `jaxgpt-export convert`; exit code 1, and no artifact, when module and Flax differ."""
    check_replaceable(options.out, options.overwrite, "certificate.json", [options.run])
    run = open_run(options.run)
    model = dataclasses.replace(run.config.model, qat=False)
    dataset = open_dataset(options.data or Path(run.config.data["folder"]))
    check_tokenizer(run.config, dataset)
    step, trained = load_params(run, options.step)
    params = without_scales(trained)
    tensors = hf_tensors(params, model)
    tokens = probe_tokens(dataset.val, model.block_size)
    reference = all_flax_logits(model, params, tokens)
    module = float_model(
        model, {from_hf_name(name): from_hf_layout(name, tensor) for name, tensor in tensors.items()}
    )
    meter = ParityMeter()
    with torch.inference_mode():
        for row, expected in zip(tokens, reference.split(model.block_size), strict=True):
            meter.add(expected, module(row[None].long())[0])
    parity = dataclasses.asdict(meter.result())
    if parity["max_abs_logit_diff"] > MAX_FP32_LOGIT_DIFF:
        say(
            f"FAIL  logits of the PyTorch module differ from Flax by {parity['max_abs_logit_diff']:.2e}, "
            f"at most {MAX_FP32_LOGIT_DIFF:.0e} is allowed; no artifact was written"
        )
        return Result({"step": step, "parity": parity}, passed=False)
    positions = probe_positions(tokens.numel(), model.vocab_size)
    origin: dict[str, Any] = {
        "run": str(options.run),
        "step": step,
        "run_config_sha256": sha256_of(options.run / "config.json"),
        "preset": run.config.preset,
        "data": run.config.data,
        "versions": versions("jax", "flax", "torch", "safetensors"),
    }
    with new_folder(options.out, options.overwrite, "certificate.json") as folder:
        write_artifact(folder, model, None, tensors, run.tokenizer)
        write_probe(folder, Probe(tokens, positions, reference[positions]))
        if run.config.model.qat:
            rounded = all_flax_logits(run.config.model, trained, tokens)[positions]
            save_file({**input_scales(trained), "logits": rounded}, folder / TRAINED_FILE)
        figures = {"parity": {**parity, "positions": tokens.numel(), "against": "Flax fp32"}}
        certificate = write_certificate(folder, "fp32", origin, figures)
        size = (folder / "model.safetensors").stat().st_size
    say(
        f"{options.out}: step {step}, {size / 1e6:.2f} MB; against Flax on {tokens.numel():,} positions: "
        f"max abs logit difference {parity['max_abs_logit_diff']:.2e}, "
        f"top-1 agreement {parity['top1_agreement']:.4f}"
    )
    return Result({"size_mb": size / 1e6, **certificate})
