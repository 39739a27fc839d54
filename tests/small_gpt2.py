"""A small random GPT-2 of transformers, as a folder that is imported; what an import has to give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, rows
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.model.build import build_model
from torch import Tensor

from jaxgpt.data.make_tokenizer import make_tokenizer
from jaxgpt.shared.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")


FLOAT32_TOLERANCE = 1e-5  # two orders of float32 sums, on logits of size 1


SHAPE = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}


def small_tokenizer() -> Tokenizer:
    """A small byte-level BPE."""
    return make_tokenizer("bpe:300", [row["text"] for row in rows(40)])


def gpt2(vocab_size: int, **settings: Any) -> Any:
    """A random GPT-2 of transformers whose logits are not all alike."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=vocab_size, initializer_range=0.2, **SHAPE, **ends, **settings
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases of 0 and gains of 1 would hide that they are swapped
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: Any, tokenizer: Tokenizer, folder: Path, **options: Any) -> Path:
    """Write a Hugging Face folder with a tokenizer."""
    model.save_pretrained(folder, **options)
    tokenizer.save(folder)
    (folder / "tokenizer.json").unlink()
    return folder


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def tokens_for(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))


def run_import(command: Command, source: Path, out: Path, *more: object) -> str:
    """Import a folder; return what was said."""
    code, _, err = command("jaxgpt-export", "import-hf", "--source", source, "--out", out, *more)
    assert code == 0, err
    return err


def assert_same_in_transformers(source_model: Any, again: Any, tokens: Tensor, vocab_size: int) -> None:
    """The tensors are the source's, but for rows that are no token, and the logits are, too."""
    found, expected = again.state_dict(), source_model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor[:vocab_size] if name in ("transformer.wte.weight", "lm_head.weight") else tensor
        assert torch.equal(found[name], wanted), name
    # A product with fewer rows may be another kernel's, which sums in another order.
    is_padded = len(source_model.lm_head.weight) > vocab_size
    difference = logits_of(again, tokens) - logits_of(source_model, tokens)[..., :vocab_size]
    assert float(difference.abs().max()) <= (FLOAT32_TOLERANCE if is_padded else 0.0)


def assert_same(source_model: Any, out: Path, tokenizer: Tokenizer, tied: bool) -> None:
    """The artifact gives the logits of the source, in this module and in transformers."""
    tokens = tokens_for(tokenizer.vocab_size)
    expected = logits_of(source_model, tokens)[..., : tokenizer.vocab_size]
    artifact = read_artifact(out)
    assert artifact.config.tied == tied
    assert float((build_model(artifact)(tokens) - expected).abs().max()) <= FLOAT32_TOLERANCE
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert_same_in_transformers(source_model, again, tokens, tokenizer.vocab_size)
    assert artifact.tokenizer().sha256 == tokenizer.sha256
