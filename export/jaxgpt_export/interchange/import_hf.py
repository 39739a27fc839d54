"""`jaxgpt-export import-hf`: a Hugging Face GPT-2, from a folder or by its name -> a float32 artifact.

    jaxgpt-export import-hf --source FOLDER|hub:NAME[@REVISION] --out ART [--data DATA]
    jaxgpt-export import-hf --source FOLDER --tokenizer gpt2|FOLDER --out ART    (a source without one)

hf_folder.py says what such a folder may be, hub.py how a model of the hub is downloaded.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.files import check_replaceable, only_writer

from jaxgpt_export.format.certificate import versions
from jaxgpt_export.interchange.hub import PREFIX, HubModel, fetch, parse_name


@dataclasses.dataclass(frozen=True)
class ImportHfOptions:
    """Turn a Hugging Face GPT-2 into a float32 artifact.

    Attributes:
      source: the folder: config.json, weights, and vocab.json with merges.txt or tokenizer.json; or
        hub:ORGANIZATION/NAME[@REVISION], a model of the Hugging Face hub.
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
    source, hub = str(options.source), None
    inputs = [options.data] if options.data else []
    if not source.startswith(PREFIX):
        inputs.append(Path(source))
    if options.tokenizer not in (None, "gpt2"):
        inputs.append(Path(options.tokenizer))
    check_replaceable(options.out, options.overwrite, "certificate.json", inputs)
    with only_writer(options.out):
        folder = Path(source)
        if source.startswith(PREFIX):
            hub, folder = fetch(*parse_name(source))
        return import_folder(folder, options.out, options.data, options.overwrite, hub, options.tokenizer)


def import_folder(
    folder: Path,
    out: Path,
    data: Path | None = None,
    overwrite: bool = False,
    hub: HubModel | None = None,
    tokenizer: str | None = None,
) -> Result:
    """Turn a folder into an artifact; see ImportHfOptions.

    Args:
      folder: what to read.
      out: the artifact folder.
      data: dataset folder to compare on; random tokens if not given.
      overwrite: replace an earlier artifact.
      hub: the model of the hub that the folder was downloaded from, for the certificate.
      tokenizer: gpt2 or a folder, where the folder holds none.
    """
    from jaxgpt_export.format.generation_config import GENERATION_CONFIG, not_taken_over
    from jaxgpt_export.interchange.float64_gpt import Float64GPT
    from jaxgpt_export.interchange.hf_folder import read_hf, transformers_reference
    from jaxgpt_export.interchange.imported_model import Reference, certify_and_write, choose_tokens, rows_of
    from jaxgpt_export.model.build import as_tensors

    model = read_hf(folder, tokenizer)
    if hub is not None:
        model = dataclasses.replace(model, provenance=_provenance(hub))
    tokens, text = choose_tokens(model, data, tokenizer or folder)
    if importlib.util.find_spec("transformers") is not None:
        reference: Reference = transformers_reference(folder, model.config.vocab_size)
        against = "transformers fp32"
        used = versions("torch", "safetensors", "transformers")
    else:
        reference = Float64GPT(as_tensors(model.tensors), model.config.n_head)
        against = "a float64 forward pass (transformers is not installed)"
        used = versions("torch", "safetensors")
    figures = {"probe": text}
    logits = rows_of(reference, tokens)
    del reference  # all its weights
    done = certify_and_write(model, tokens, logits, against, used, out, overwrite, figures)
    if ignored := not_taken_over(folder, model.tokenizer.endoftext):
        say(f"{folder / GENERATION_CONFIG}: not taken over, as nothing here does it: {', '.join(ignored)}")
    return done


def _provenance(hub: HubModel) -> dict[str, Any]:
    return {
        "source": f"{PREFIX}{hub.name}",
        "revision": hub.revision,
        "commit": hub.commit,
        "license": hub.license,
        "datasets": list(hub.datasets),
    }
