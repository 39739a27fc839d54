"""`jaxgpt-bench agreement`: the same greedy text from every program that reads the exported model.

    jaxgpt-bench agreement --artifact FP32 --data DATA

The float32 artifact is continued greedily by this project, by transformers (it is a Hugging Face folder) and
by llama.cpp (from GGUF files in float32 and float16), from the beginnings of validation texts. llama.cpp is
an option: `pip install llama-cpp-python`.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.generation.session import Session
from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json
from jaxgpt_bench.common.tables import Table
from jaxgpt_bench.common.timing import agreeing, timed_generation
from jaxgpt_bench.peers.llama_cpp_ import LlamaCppSession
from jaxgpt_bench.peers.transformers_ import TransformersSession

if TYPE_CHECKING:
    from jaxgpt_export.format.artifact import Artifact as Artifact
    from jaxgpt_export.interchange.gguf_file import FileType as FileType
else:  # they import PyTorch
    Artifact, FileType = Any, str

PROMPTS = 10
KINDS: tuple[FileType, ...] = ("f32", "f16")
MUST_AGREE = {"llama.cpp f16": 20}  # tokens; float16 weights may turn a near tie later on. Others: all


@dataclasses.dataclass(frozen=True)
class AgreementOptions:
    """Compare greedy texts of programs that read the same model.

    Attributes:
      artifact: float32 artifact with learned positions.
      data: dataset folder: prompts are the beginnings of validation texts.
      tokens: to generate from each prompt.
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path
    data: Path
    tokens: int = 100
    out: Path | None = None
    json: bool = False


@contextlib.contextmanager
def sessions(artifact: Artifact) -> Iterator[dict[str, Callable[[], Session]]]:
    """Give what opens each program that is installed, this project's first."""
    from jaxgpt_export.generation.torch_session import TorchSession
    from jaxgpt_export.interchange.gguf_file import write_gguf
    from jaxgpt_export.model.build import build_model

    found: dict[str, Callable[[], Session]] = {"jaxgpt": lambda: TorchSession(build_model(artifact))}
    found["transformers"] = lambda: TransformersSession(str(artifact.folder), True, False)
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as scratch:
        if importlib.util.find_spec("llama_cpp") is None:
            say("llama.cpp is left out: llama_cpp is not installed (pip install llama-cpp-python)")
        else:
            for kind in KINDS:
                path = Path(scratch) / f"{kind}.gguf"
                write_gguf(artifact, artifact.tokenizer(), path, kind)
                opened = functools.partial(LlamaCppSession, path, float32_cache=True)
                found[f"llama.cpp {kind}"] = opened
        yield found


def agreement(options: AgreementOptions) -> Result:
    """Run `jaxgpt-bench agreement`; exit code 1 when texts part too early."""
    from jaxgpt_export.format.artifact import read_certified_artifact

    from jaxgpt_bench.common.provenance import provenance
    from jaxgpt_bench.quality.samples import sample_prompts, val_documents

    prepare_output_file(options.out)
    artifact, dataset = read_certified_artifact(options.artifact), open_dataset(options.data)
    tokenizer = artifact.tokenizer()
    if dataset.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"{options.data} was made with another tokenizer than {options.artifact}")
    if artifact.quantization is not None or artifact.config.positions != "learned":
        raise UserError(f"{options.artifact} is no Hugging Face GPT-2; give a float32 artifact")
    longest = artifact.config.block_size - options.tokens
    if options.tokens < 1 or longest < 2:
        raise UserError(f"--tokens {options.tokens} must lie in 1 to {artifact.config.block_size - 2}")
    found = sample_prompts(val_documents(dataset.val, tokenizer), tokenizer, PROMPTS, min(longest, 64))
    texts = [prompt.text for prompt in found]
    prompts = [tokenizer.encode(text, special=True) for text in texts if text]
    if not prompts:
        raise UserError(
            f"{options.data}: no whole document of its validation split has a beginning of at most "
            f"{min(longest, 64)} tokens; prepare it with a larger --val-fraction"
        )
    written: dict[str, list[list[int]]] = {}
    with sessions(artifact) as opened_by:
        for name, opened in opened_by.items():
            session = opened()
            written[name] = [
                timed_generation(session, prompt, options.tokens)["tokens"] for prompt in prompts
            ]
    ours = written.pop("jaxgpt")
    rows: list[dict[str, Any]] = []
    gates: dict[str, bool] = {}
    for name, theirs in written.items():
        same = [agreeing(a, b) for a, b in zip(ours, theirs, strict=True)]
        needed = min(MUST_AGREE.get(name, options.tokens), options.tokens)
        rows.append({"program": name, "tokens_until_parting": same, "needed": needed})
        gates[f"{name}: the first {needed} tokens are the same for every prompt"] = min(same) >= needed
    stderr.print(agreement_table(rows, options.tokens).terminal())
    for text, passed in gates.items():
        say(f"{'pass' if passed else 'FAIL'}  {text}")
    figures = {
        **provenance().to_json(),
        "artifact": artifact.kind,
        "prompts": texts,
        "tokens": options.tokens,
        "rows": rows,
        "texts": [tokenizer.decode(tokens) for tokens in ours],
        "gates": gates,
    }
    if options.out is not None:
        write_json(options.out, figures)
    return Result(figures, passed=all(gates.values()))


def agreement_table(rows: list[dict[str, Any]], tokens: int) -> Table:
    """Lay the rows out."""
    cells = []
    for row in rows:
        same = row["tokens_until_parting"]
        whole = f"{sum(count == tokens for count in same)} of {len(same)}"
        cells.append((row["program"], str(min(same)), whole))
    return Table(("program", f"same tokens of {tokens}, least", "texts wholly the same"), tuple(cells))
