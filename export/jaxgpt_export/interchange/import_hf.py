"""`jaxgpt-export import-hf`: a Hugging Face GPT-2 folder -> a float32 artifact.

    jaxgpt-export import-hf --source FOLDER --out ART [--data DATA] [--tokenizer gpt2|FOLDER]

hf_folder.py says what such a folder may be.
"""

import dataclasses
import importlib.util
from pathlib import Path

from jaxgpt.shared.console import Result
from jaxgpt.shared.files import check_replaceable

from jaxgpt_export.format.certificate import versions


@dataclasses.dataclass(frozen=True)
class ImportHfOptions:
    """Turn a Hugging Face GPT-2 folder into a float32 artifact.

    Attributes:
      source: the folder: config.json, weights, and vocab.json with merges.txt or tokenizer.json.
      out: the artifact folder to write.
      tokenizer: gpt2, or a folder with a tokenizer; only for a source that holds none.
      data: dataset folder whose validation split is compared on; random tokens if not given.
      overwrite: replace an earlier artifact.
      json: print one JSON document with all figures on stdout.
    """

    source: Path
    out: Path
    tokenizer: str | None = None
    data: Path | None = None
    overwrite: bool = False
    json: bool = False


def import_hf(options: ImportHfOptions) -> Result:
    """Run `jaxgpt-export import-hf`; exit code 1, and no artifact, when the logits differ."""
    from jaxgpt_export.interchange.float64_gpt import Float64GPT
    from jaxgpt_export.interchange.hf_folder import read_hf, transformers_reference
    from jaxgpt_export.interchange.imported_model import Reference, certify_and_write, choose_tokens, rows_of
    from jaxgpt_export.model.build import as_tensors

    inputs = [options.source, *([options.data] if options.data else [])]
    if options.tokenizer not in (None, "gpt2"):
        inputs.append(Path(options.tokenizer))
    check_replaceable(options.out, options.overwrite, "certificate.json", inputs)
    model = read_hf(options.source, options.tokenizer)
    tokens, text = choose_tokens(model, options.data)
    if importlib.util.find_spec("transformers") is not None:
        reference: Reference = transformers_reference(options.source, model.config.vocab_size)
        against = "transformers fp32"
        used = versions("torch", "safetensors", "transformers")
    else:
        reference = Float64GPT(as_tensors(model.tensors), model.config.n_head)
        against = "a float64 forward pass (transformers is not installed)"
        used = versions("torch", "safetensors")
    figures = {"probe": text}
    logits = rows_of(reference, tokens)
    return certify_and_write(model, tokens, logits, against, used, options.out, options.overwrite, figures)
