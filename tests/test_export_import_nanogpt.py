"""Checkpoints of nanoGPT and minGPT become artifacts that compute the same, up to nanoGPT's other GELU."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, assert_one_line_error, rows, write_jsonl
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.probe import read_probe
from jaxgpt_export.interchange.import_nanogpt import ImportNanogptOptions, import_nanogpt
from jaxgpt_export.model.build import build_model, load
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from jaxgpt.data.make_tokenizer import make_tokenizer
from jaxgpt.shared.tokenizer import Tokenizer

FLOAT32_TOLERANCE = 1e-5  # two orders of float32 sums, on logits of size 1
GELU_APART = 1e-6  # tanh and erf differ by up to 5e-4 in each activation; rounding alone gives 1e-14 here
PAD = 7  # rows of a padded vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small byte-level BPE."""
    return make_tokenizer("bpe:300", [row["text"] for row in rows(40)])


def tokens_for(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))


class NanoGPT(nn.Module):
    """nanoGPT's modules and names, written with nn.Linear and the exact GELU; minGPT's with the other one."""

    def __init__(self, vocab_size: int, bias: bool, gelu: str, C: int = 32, T: int = 16, H: int = 4) -> None:
        super().__init__()
        self.n_head, self.gelu = H, gelu

        def block() -> nn.ModuleDict:
            attn = nn.ModuleDict(
                {"c_attn": nn.Linear(C, 3 * C, bias=bias), "c_proj": nn.Linear(C, C, bias=bias)}
            )
            attn.register_buffer("bias", torch.ones(1, 1, T, T).tril())
            mlp = nn.ModuleDict(
                {"c_fc": nn.Linear(C, 4 * C, bias=bias), "c_proj": nn.Linear(4 * C, C, bias=bias)}
            )
            norms = {f"ln_{i}": nn.LayerNorm(C, bias=bias) for i in (1, 2)}
            return nn.ModuleDict({**norms, "attn": attn, "mlp": mlp})

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, C),
                "wpe": nn.Embedding(T, C),
                "h": nn.ModuleList(block() for _ in range(2)),
                "ln_f": nn.LayerNorm(C, bias=bias),
            }
        )
        self.lm_head = nn.Linear(C, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        part: Any = self.transformer
        x = part["wte"](tokens) + part["wpe"](torch.arange(tokens.shape[1]))
        for block in part["h"]:
            qkv = block["attn"]["c_attn"](block["ln_1"](x)).unflatten(-1, (3, self.n_head, -1))
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            mixed = (
                F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
            )
            x = x + block["attn"]["c_proj"](mixed)
            inner = F.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate=self.gelu)
            x = x + block["mlp"]["c_proj"](inner)
        return self.lm_head(part["ln_f"](x))


def nanogpt(vocab_size: int, bias: bool = True, gelu: str = "none", tied: bool = True) -> NanoGPT:
    torch.manual_seed(0)
    model = NanoGPT(vocab_size, bias, gelu)
    if tied:
        model.transformer["wte"].weight = model.lm_head.weight
    return model.eval()


ARGS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "dropout": 0.1}


def checkpoint(model: NanoGPT, path: Path, **arguments: object) -> Path:
    """What nanoGPT saves of a compiled model."""
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    V = len(model.lm_head.weight)
    args = {**ARGS, "vocab_size": V, "bias": model.transformer["ln_f"].bias is not None, **arguments}
    torch.save({"model": state, "model_args": args, "iter_num": 3, "best_val_loss": torch.tensor(2.0)}, path)
    return path


@pytest.fixture
def tokens_folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder with the tokenizer."""
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(("bias", "tied"), [(True, True), (False, True), (True, False)])
def test_nanogpt_checkpoint_gives_its_logits_up_to_the_gelu(
    command: Command, tokenizer: Tokenizer, tokens_folder: Path, tmp_path: Path, bias: bool, tied: bool
) -> None:
    model = nanogpt(tokenizer.vocab_size + PAD, bias, tied=tied)
    source = checkpoint(model, tmp_path / "ckpt.pt")
    call = ("--source", source, "--tokenizer", tokens_folder, "--out", tmp_path / "a", "--json")
    code, out, err = command("jaxgpt-export", "import-nanogpt", *call)
    assert code == 0, err
    figures = json.loads(out)
    artifact = read_artifact(tmp_path / "a")
    assert artifact.config.tied == tied
    assert ("no biases" in err) == (not bias)
    tokens = torch.from_numpy(read_probe(artifact).tokens).long()
    ours = build_model(artifact)(tokens)
    with torch.no_grad():
        erf = model(tokens)[..., : tokenizer.vocab_size]
        model.gelu = "tanh"
        tanh = model(tokens)[..., : tokenizer.vocab_size]
    assert float((ours - tanh).abs().max()) <= FLOAT32_TOLERANCE
    apart = float((ours - erf).abs().max())
    assert apart > GELU_APART
    assert figures["gelu"]["max_abs_logit_diff"] == pytest.approx(apart, rel=0.05)
    for logits, name in ((erf, "loss_erf"), (tanh, "loss_tanh")):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert figures["gelu"][name] == pytest.approx(float(loss), abs=1e-5)
    assert re.search(r"GELU: .* at most \d\.\d\de-\d\d", err)
    assert command("jaxgpt-export", "verify", "--artifact", tmp_path / "a")[0] == 0


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bare_state_dict_of_mingpt_needs_the_number_of_heads(
    command: Command, tokenizer: Tokenizer, tokens_folder: Path, tmp_path: Path, suffix: str
) -> None:
    model = nanogpt(tokenizer.vocab_size, gelu="tanh", tied=False)
    source = tmp_path / f"model{suffix}"
    torch.save(model.state_dict(), source) if suffix == ".pt" else save_file(model.state_dict(), source)
    call = ("--source", source, "--tokenizer", tokens_folder, "--out", tmp_path / "a")
    assert_one_line_error(command("jaxgpt-export", "import-nanogpt", *call), "give --n-head")
    assert command("jaxgpt-export", "import-nanogpt", *call, "--n-head", 4)[0] == 0
    tokens = tokens_for(tokenizer.vocab_size)
    with torch.no_grad():
        expected = model(tokens)
    assert float((load(tmp_path / "a")(tokens) - expected).abs().max()) <= FLOAT32_TOLERANCE


class Surprise:
    """What a pickle must not bring along."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("surprise"),))  # type: ignore[return-value]


def test_bad_checkpoints_are_one_line(
    command: Command,
    tokenizer: Tokenizer,
    tokens_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model, path = nanogpt(tokenizer.vocab_size), tmp_path / "ckpt.pt"

    def refused(*parts: str, more: tuple[object, ...] = ()) -> None:
        call = ("--source", path, "--tokenizer", tokens_folder, "--out", tmp_path / "a", *more)
        assert_one_line_error(command("jaxgpt-export", "import-nanogpt", *call), *parts)
        assert not (tmp_path / "a").exists()

    refused("ckpt.pt are missing")
    checkpoint(model, path, n_layer=3)
    refused("model_args has n_layer 3, its tensors have 2")
    checkpoint(model, path, vocab_size=50304)
    refused("vocab_size 50304", "have 300")
    checkpoint(model, path)
    refused("model_args has n_head 4, --n-head is 2", more=("--n-head", 2))
    content = path.read_bytes()
    for size in (0, 50, len(content) // 2):
        path.write_bytes(content[:size])
        refused("can't be read as tensors")
    with path.open("wb") as file:
        pickle.dump({"model": Surprise()}, file)
    refused("can't be read as tensors", "run code")
    assert not (tmp_path / "surprise").exists()
    torch.save({"model": [1, 2]}, path)
    refused("holds a list", "expected a state dict")
    torch.save({"a": torch.ones(2)}, path)
    refused("holds no matrix wte.weight")
    state = model.state_dict()
    name = "transformer.h.0.attn.c_attn.weight"
    torch.save({**state, name: state[name].t()}, path)
    refused("h.0.attn.c_attn.weight is (32, 96), expected (96, 32)", "nn.Linear", more=("--n-head", 4))
    torch.save({n: t for n, t in state.items() if n != "transformer.h.1.attn.c_attn.bias"}, path)
    refused("missing tensors: h.1.attn.c_attn.bias", more=("--n-head", 4))
    state[name][3, 4] = float("inf")
    torch.save(state, path)
    refused("h.0.attn.c_attn.weight holds NaN or infinity", more=("--n-head", 4))
    shutil.rmtree(tokens_folder)
    refused("neither gpt2 nor a folder")


def test_gpt2_vocabulary_of_nanogpt_is_trimmed_from_50304(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NanoGPT(50304, False, "none", C=8, T=4, H=2)
    path = checkpoint(model, tmp_path / "ckpt.pt", n_head=2, n_embd=8, block_size=4)
    assert import_nanogpt(ImportNanogptOptions(path, "gpt2", tmp_path / "a")).passed
    assert read_artifact(tmp_path / "a").config.vocab_size == 50257


def test_data_of_another_tokenizer_names_the_one_that_was_given(
    command: Command, tokenizer: Tokenizer, tokens_folder: Path, tmp_path: Path
) -> None:
    lines = write_jsonl(tmp_path / "rows.jsonl", rows(60))
    prepare = (
        "--source",
        lines,
        "--val-fraction",
        0.2,
        "--tokenizer",
        "bpe:290",
        "--out",
        tmp_path / "other",
    )
    assert command("jaxgpt", "prepare", *prepare)[0] == 0
    source = checkpoint(nanogpt(tokenizer.vocab_size), tmp_path / "ckpt.pt")
    call = (
        "--source",
        source,
        "--tokenizer",
        tokens_folder,
        "--data",
        tmp_path / "other",
        "--out",
        tmp_path / "a",
    )
    found = command("jaxgpt-export", "import-nanogpt", *call)
    assert_one_line_error(found, f"prepare it with: jaxgpt prepare --tokenizer {tokens_folder}")
