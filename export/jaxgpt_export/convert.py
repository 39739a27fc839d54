"""`jaxgpt-export convert`: a run -> the float32 artifact.

    jaxgpt-export convert --run runs/demo/run --out runs/demo/fp32

Names are a table, layouts agree (Flax kernels and Hugging Face's Conv1D are both (I, O)), so nothing is
folded or transposed; the certificate says how far the module's logits are from Flax's. A quantization-aware
training gives its float weights, and in qat.safetensors the scales of its inputs with the logits that it
computed.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.generation.sampling import DEFAULTS, NO_PENALTY, WHOLE, choose_sampling
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, new_folder, only_writer, sha256_of
from jaxgpt.shared.tensor_file import Arrays, write_tensor_file

from jaxgpt_export.format.artifact import write_artifact
from jaxgpt_export.format.certificate import TRAINED_FILE, versions, write_certificate
from jaxgpt_export.format.model_card import write_model_card
from jaxgpt_export.format.probe import Probe, probe_positions, probe_tokens, write_probe
from jaxgpt_export.format.tensors import from_hf_layout

if TYPE_CHECKING:
    from jaxgpt_export.flax_run.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Turn a run's checkpoint into a float32 artifact, a Hugging Face GPT-2 folder with a certificate.

    Attributes:
      run: the run folder.
      out: the artifact folder to write.
      step: best, latest, or a stored step.
      data: dataset folder whose validation split is compared on; the run's own if not given.
      temperature: that `generate`, LLM, the server and other programs draw this model's tokens with, if they
        are told none. Any of these six writes it and the first four into generation_config.json, and those of
        the four that are not given have the values of generate (0.8, 0, 1, 0.05).
      top_k: the most probable tokens that are kept; 0 keeps all.
      top_p: the fewest tokens are kept whose probabilities reach p.
      min_p: tokens are kept that are at least so probable as the most probable one times this.
      repetition_penalty: divides the positive logits of tokens that a text has, and multiplies the negative
        ones.
      no_repeat_ngram_size: no run of so many tokens comes twice.
      overwrite: replace an earlier artifact.
      json: print one JSON document with all figures on stdout.
    """

    run: Path
    out: Path
    step: str = "best"
    data: Path | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    overwrite: bool = False
    json: bool = False


def convert(options: ConvertOptions) -> Result:
    """Run `jaxgpt-export convert`; exit code 1, and no artifact, when module and Flax differ."""
    sampling_of(options)  # a bad value is said before anything is loaded
    check_replaceable(options.out, options.overwrite, "certificate.json", [options.run])
    with only_writer(options.out):
        return _convert(options)


def sampling_of(options: ConvertOptions) -> dict[str, int | float]:
    """Return what the artifact says of how its tokens are drawn, or nothing.

    Raises:
      UserError: a value is out of its range.
    """
    asked = {name: getattr(options, name) for name in (*DEFAULTS, *NO_PENALTY)}
    if all(value is None for value in asked.values()):
        return {}
    if options.temperature is not None and options.temperature <= 0:
        raise UserError(
            f"--temperature of an artifact ({options.temperature}) must be above 0, as other programs want "
            "it; `generate --temperature 0` writes greedy text"
        )
    sampling = choose_sampling({}, 0, **asked)
    values = {name: getattr(sampling, name) for name in DEFAULTS}
    values |= {name: at for name, none in NO_PENALTY.items() if (at := getattr(sampling, name)) != none}
    return {name: value if name in WHOLE else float(value) for name, value in values.items()}


def _convert(options: ConvertOptions) -> Result:
    from jaxgpt_export.flax_run.checkpoint import read_checkpoint
    from jaxgpt_export.model.build import as_tensors, float_model
    from jaxgpt_export.parity.probe_gates import compare_rows, fp32_bound

    checkpoint = read_checkpoint(options.run, options.step)
    model = checkpoint.model
    dataset = open_dataset(options.data or Path(checkpoint.data["folder"]))
    checkpoint.check_dataset(dataset)
    tensors = checkpoint.tensors()
    tokens = probe_tokens(dataset.val, model.block_size)
    reference = checkpoint.logits(tokens)
    module = float_model(model, as_tensors(from_hf_layout(tensors, model)))
    rows = reference.reshape(*tokens.shape, -1)
    parity = dataclasses.asdict(compare_rows(module, tokens, rows))
    positions = probe_positions(tokens.size, model)
    probe = Probe(tokens, positions, reference[positions])
    bound = fp32_bound(probe)
    if parity["max_abs_logit_diff"] > bound:
        say(
            f"FAIL  logits of the PyTorch module differ from Flax by {parity['max_abs_logit_diff']:.2e}, "
            f"at most {bound:.1e} is allowed; no artifact was written"
        )
        return Result({"step": checkpoint.step, "parity": parity}, passed=False)
    certificate, size = _write(options, checkpoint, tensors, probe, parity)
    say(
        f"{options.out}: step {checkpoint.step}, {size / 1e6:.2f} MB; against Flax on {tokens.size:,} "
        f"positions: max abs logit difference {parity['max_abs_logit_diff']:.2e}, "
        f"top-1 agreement {parity['top1_agreement']:.4f}"
    )
    return Result({"size_mb": size / 1e6, **certificate})


def _write(
    options: ConvertOptions, checkpoint: "Checkpoint", tensors: Arrays, probe: Probe, parity: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """Write the artifact; return its certificate and the bytes of its weights."""
    origin = {
        "run": str(options.run),
        "step": checkpoint.step,
        "run_config_sha256": sha256_of(options.run / "config.json"),
        "preset": checkpoint.preset,
        "data": checkpoint.data,
        **({"overrides": checkpoint.overrides} if checkpoint.overrides else {}),
        "versions": versions("jax", "flax", "torch", "safetensors"),
    }
    figures = {"parity": {**parity, "positions": probe.tokens.size, "against": "Flax fp32"}}
    with new_folder(options.out, options.overwrite, "certificate.json") as folder:
        write_artifact(folder, checkpoint.model, None, tensors, checkpoint.tokenizer, sampling_of(options))
        write_probe(folder, probe)
        if checkpoint.fake_quantized:
            rounded = checkpoint.logits(probe.tokens, rounded=True)[probe.positions]
            write_tensor_file(folder / TRAINED_FILE, {**checkpoint.input_scales(), "logits": rounded})
        certificate = write_certificate(folder, "fp32", origin, figures)
        write_model_card(folder, checkpoint.model, certificate)
        size = (folder / "model.safetensors").stat().st_size
    return certificate, size
