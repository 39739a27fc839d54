"""`jaxgpt-export import-nanogpt`: a checkpoint of nanoGPT, minGPT or llm.c -> a float32 artifact.

    jaxgpt-export import-nanogpt --source ckpt.pt --tokenizer gpt2|FOLDER --out ART [--n-head N]

weights/nanogpt_checkpoint.py says what such a file may hold. nanoGPT computes GELU by erf; this program,
minGPT and llm.c by tanh: what that changes is measured and said, and a little training is all that helps.
"""

import dataclasses
from pathlib import Path

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.files import check_replaceable, only_writer
from jaxgpt.shared.tokenizer import named_tokenizer

from jaxgpt_export.format.certificate import versions


@dataclasses.dataclass(frozen=True)
class ImportNanogptOptions:
    """Turn a checkpoint of nanoGPT, minGPT or llm.c into a float32 artifact.

    Attributes:
      source: ckpt.pt of nanoGPT or of a trainer like it, a state dict of minGPT, a .safetensors file with the
        same names, or a .bin file of llm.c.
      tokenizer: gpt2, or a folder with a tokenizer (an artifact, a data set, of Hugging Face).
      out: the artifact folder to write.
      n_head: attention heads; needed where the checkpoint does not say, as its tensors do not tell.
      data: dataset folder whose validation split is compared on; random tokens if not given.
      overwrite: replace an earlier artifact.
      json: print one JSON document with all figures on stdout.
    """

    source: Path
    tokenizer: str
    out: Path
    n_head: int | None = None
    data: Path | None = None
    overwrite: bool = False
    json: bool = False


def import_nanogpt(options: ImportNanogptOptions) -> Result:
    """Run `jaxgpt-export import-nanogpt`; exit code 1, and no artifact, when the logits differ."""
    inputs = [options.source, *([options.data] if options.data else [])]
    if options.tokenizer != "gpt2":
        inputs.append(Path(options.tokenizer))
    check_replaceable(options.out, options.overwrite, "certificate.json", inputs)
    with only_writer(options.out):
        return _import(options)


def _import(options: ImportNanogptOptions) -> Result:
    from jaxgpt_export.interchange.float64_gpt import Float64GPT
    from jaxgpt_export.interchange.imported_model import certify_and_write, choose_tokens, rows_of
    from jaxgpt_export.interchange.weights.nanogpt_checkpoint import gelu_figures, read_nanogpt
    from jaxgpt_export.model.build import as_tensors

    model = read_nanogpt(options.source, named_tokenizer(options.tokenizer), options.n_head)
    tokens, text = choose_tokens(model, options.data, options.tokenizer)
    tanh, erf = (
        rows_of(Float64GPT(as_tensors(model.tensors), model.config.n_head, gelu), tokens)
        for gelu in ("tanh", "erf")
    )
    gelu = gelu_figures(tokens, tanh, erf)
    del erf  # as large as the others, which are compared
    if model.format == "nanogpt":
        _say_gelu(gelu, text)
    figures = {"probe": text, "gelu": gelu}
    against = "a float64 forward pass with tanh GELU"
    used = versions("torch", "safetensors")
    return certify_and_write(model, tokens, tanh, against, used, options.out, options.overwrite, figures)


def _say_gelu(gelu: dict[str, float], text: str) -> None:
    say(
        f"GELU: this program computes it by tanh, as minGPT does; nanoGPT by erf. If this model was trained "
        f"with erf, its logits change by at most {gelu['max_abs_logit_diff']:.2e} and its loss from "
        f"{gelu['loss_erf']:.5f} to {gelu['loss_tanh']:.5f} nats (on {text})"
    )
