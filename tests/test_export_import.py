"""Models of other programs become artifacts that compute the same."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, assert_one_line_error, rows, write_jsonl
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.certificate import read_certificate
from jaxgpt_export.format.probe import read_probe
from jaxgpt_export.interchange.import_nanogpt import ImportNanogptOptions, import_nanogpt
from jaxgpt_export.model.build import build_model, load
from jaxgpt_export.parity.probe_gates import MAX_FP32_LOGIT_DIFF
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from jaxgpt.data.make_tokenizer import make_tokenizer
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")

FLOAT32_TOLERANCE = 1e-5  # two orders of float32 sums, on logits of size 1
GELU_APART = 1e-6  # tanh and erf differ by up to 5e-4 in each activation; rounding alone gives 1e-14 here
PAD = 7  # rows of a padded vocabulary
SHAPE = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
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


@pytest.fixture
def source(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A Hugging Face folder with a tied head."""
    return save(gpt2(tokenizer.vocab_size), tokenizer, tmp_path / "hf")


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


def assert_same(source_model: Any, out: Path, tokenizer: Tokenizer, tied: bool) -> None:
    """The artifact gives the logits of the source, in this module and in transformers."""
    tokens = tokens_for(tokenizer.vocab_size)
    expected = logits_of(source_model, tokens)[..., : tokenizer.vocab_size]
    artifact = read_artifact(out)
    assert artifact.config.tied == tied
    assert float((build_model(artifact)(tokens) - expected).abs().max()) <= FLOAT32_TOLERANCE
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert float((logits_of(again, tokens) - expected).abs().max()) == 0.0
    assert artifact.tokenizer().sha256 == tokenizer.sha256


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, PAD])
def test_imported_folder_gives_the_logits_of_transformers(
    command: Command, tokenizer: Tokenizer, tmp_path: Path, tied: bool, padding: int
) -> None:
    model = gpt2(tokenizer.vocab_size + padding, tie_word_embeddings=tied)
    said = run_import(command, save(model, tokenizer, tmp_path / "hf"), tmp_path / "a")
    assert_same(model, tmp_path / "a", tokenizer, tied)
    V = tokenizer.vocab_size
    assert (f"rows {V} to {V + PAD - 1} of the vocabulary are no token" in said) == (padding > 0)
    certificate = read_certificate(tmp_path / "a")
    assert certificate["kind"] == "fp32"
    assert certificate["parity"]["against"] == "transformers fp32"
    assert certificate["origin"]["format"] == "huggingface"
    assert set(certificate["origin"]["source_sha256"]) == {"config.json", "model.safetensors"}


def test_imported_artifact_verifies_and_names_its_source(
    command: Command, source: Path, tmp_path: Path
) -> None:
    run_import(command, source, tmp_path / "a")
    code, _, err = command("jaxgpt-export", "verify", "--artifact", tmp_path / "a")
    assert code == 0
    assert "logits against transformers fp32" in err
    with_run = ("--artifact", tmp_path / "a", "--run", tmp_path)
    assert_one_line_error(command("jaxgpt-export", "verify", *with_run), str(source), "no run made it")


def test_shards_pickles_prefixes_masks_and_half_precision_are_read(
    command: Command, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = gpt2(tokenizer.vocab_size)
    shards = save(model, tokenizer, tmp_path / "shards", max_shard_size="30KB")
    assert (shards / "model.safetensors.index.json").exists()
    run_import(command, shards, tmp_path / "a")
    assert_same(model, tmp_path / "a", tokenizer, True)

    pickled = save(model, tokenizer, tmp_path / "pickle")
    (pickled / "model.safetensors").unlink()
    plain = {name.removeprefix("transformer."): t for name, t in model.state_dict().items()}
    plain["h.0.attn.bias"], plain["h.0.attn.masked_bias"] = (
        torch.ones(1, 1, 16, 16).tril(),
        torch.tensor(-1e4),
    )
    torch.save(plain, pickled / "pytorch_model.bin")
    assert "safetensors file is preferred" in run_import(command, pickled, tmp_path / "b")
    assert_same(model, tmp_path / "b", tokenizer, True)

    half = model.to(torch.bfloat16)
    assert "bfloat16 weights become float32" in run_import(
        command, save(half, tokenizer, tmp_path / "half"), tmp_path / "c"
    )
    assert_same(half.float(), tmp_path / "c", tokenizer, True)


def test_stored_head_decides_over_the_configuration(
    command: Command, source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tensors = load_file(source / "model.safetensors")
    path = source / "model.safetensors"
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    run_import(command, source, tmp_path / "equal")
    assert read_artifact(tmp_path / "equal").config.tied
    tensors["lm_head.weight"] = torch.randn_like(tensors["lm_head.weight"])
    save_file(tensors, path, metadata={"format": "pt"})
    assert "stays its own, as in transformers" in run_import(command, source, tmp_path / "own")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(source).eval()
    assert torch.equal(theirs.lm_head.weight, tensors["lm_head.weight"])
    assert_same(theirs, tmp_path / "own", tokenizer, False)


def test_tokenizer_json_alone_is_enough(
    command: Command, source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(source)
    (source / "vocab.json").unlink()
    (source / "merges.txt").unlink()
    path = source / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["merges"] = [merge.split(" ") for merge in value["model"]["merges"]]  # the newer spelling
    path.write_text(json.dumps(value))
    run_import(command, source, tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").sha256 == tokenizer.sha256

    def refused(change: Callable[[dict[str, Any]], object], *parts: str) -> None:
        damaged = json.loads(json.dumps(value))
        change(damaged)
        path.write_text(json.dumps(damaged))
        call = command("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "b")
        assert_one_line_error(call, "tokenizer.json", *parts)

    refused(lambda v: v["model"].update(type="Unigram"), "Unigram", "is BPE after")
    refused(lambda v: v.update(normalizer={"type": "NFC"}), "normalizer")
    refused(lambda v: v["model"]["vocab"].update({"<pad>": 900}), "GPT-2's layout")
    refused(lambda v: v["model"].pop("merges"), "damaged")
    path.unlink()
    call = command("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "b")
    assert_one_line_error(call, "holds no tokenizer", "merges.txt")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt_neo"}, ("'gpt_neo'", "expected gpt2")),
        ({"activation_function": "gelu"}, ("activation_function 'gelu'", "'gelu_new' only")),
        ({"activation_function": "relu"}, ("activation_function 'relu'",)),
        ({"n_inner": 64}, ("n_inner 64", "= 128")),
        ({"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx True",)),
        ({"scale_attn_weights": False}, ("scale_attn_weights False",)),
        ({"layer_norm_epsilon": 1e-6}, ("layer_norm_epsilon 1e-06", "1e-05 only")),
        ({"n_layer": None}, ("lacks n_layer",)),
        ({"n_layer": 3}, ("missing tensors: h.2.attn.c_attn.bias",)),
        ({"n_layer": 1}, ("unexpected tensors: h.1.",)),
        ({"n_head": 5}, ("n_embd (32) must be divisible by n_head (5)",)),
        ({"n_positions": 12}, ("wpe.weight is float32 (16, 32)", "(12, 32)")),
        ({"vocab_size": 999}, ("wte.weight is float32 (300, 32)", "(999, 32)")),
        ({"tie_word_embeddings": False}, ("missing tensors: lm_head.weight",)),
    ],
)
def test_configuration_that_does_not_fit_is_one_line(
    command: Command, source: Path, tmp_path: Path, changes: dict[str, object], parts: tuple[str, ...]
) -> None:
    edit_config(source, **changes)
    call = command("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "a")
    assert_one_line_error(call, *parts)
    assert not (tmp_path / "a").exists()


def test_settings_that_change_nothing_are_accepted(
    command: Command, source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    edit_config(
        source, n_inner=128, activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True, n_ctx=16
    )
    run_import(command, source, tmp_path / "a")
    assert_same(gpt2(tokenizer.vocab_size), tmp_path / "a", tokenizer, True)


def test_damaged_weights_are_one_line(command: Command, source: Path, tmp_path: Path) -> None:
    path, good = source / "model.safetensors", load_file(source / "model.safetensors")
    content = path.read_bytes()

    def refused(*parts: str) -> None:
        call = command("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "a")
        assert_one_line_error(call, *parts)
        assert not (tmp_path / "a").exists()

    def edited(change: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = dict(good)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    name = "transformer.h.1.mlp.c_fc.weight"
    edited(lambda t: t.update({name: t[name].t().contiguous()}))
    refused("h.1.mlp.c_fc.weight is (128, 32), expected (32, 128)", "transposed", "Conv1D")
    edited(lambda t: t.pop(name))
    refused("missing tensors: h.1.mlp.c_fc.weight")
    edited(lambda t: t.update({"score.weight": torch.ones(2, 32)}))
    refused("unexpected tensors: score.weight")
    edited(lambda t: t.update({name: torch.full((32, 128), float("nan"))}))
    refused("h.1.mlp.c_fc.weight holds NaN")
    edited(lambda t: t.update({name: torch.ones(32, 128, dtype=torch.int8)}))
    refused("h.1.mlp.c_fc.weight is int8")
    edited(lambda t: t.update({name.removeprefix("transformer."): t[name].clone()}))
    refused("holds h.1.mlp.c_fc.weight twice")
    for size in (0, 100, len(content) - 1):
        path.write_bytes(content[:size])
        refused("no readable safetensors file")
    path.unlink()
    refused("holds no weights")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    refused("does not name files of this folder")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    refused("model-1.safetensors are missing")
    save_file(good, source / "model-1.safetensors")
    refused("disagree on: a, transformer")


def test_bound_grows_with_the_logits(command: Command, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Logits of size 5,000 differ by more than 1e-4 in float32, and nothing is wrong."""
    model = gpt2(tokenizer.vocab_size)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1000)
    run_import(command, save(model, tokenizer, tmp_path / "hf"), tmp_path / "a")
    difference = read_certificate(tmp_path / "a")["parity"]["max_abs_logit_diff"]
    largest = float(abs(read_probe(read_artifact(tmp_path / "a")).logits).max())
    assert MAX_FP32_LOGIT_DIFF < difference < 2.0**-20 * largest
    assert command("jaxgpt-export", "verify", "--artifact", tmp_path / "a")[0] == 0


def test_smaller_vocabulary_than_the_tokenizer_is_refused(
    command: Command, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = save(gpt2(tokenizer.vocab_size - 1), tokenizer, tmp_path / "hf")
    call = command("jaxgpt-export", "import-hf", "--source", folder, "--out", tmp_path / "a")
    assert_one_line_error(call, "299 tokens, the tokenizer 300")


def test_logits_that_differ_leave_no_artifact(
    command: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxgpt_export.interchange import import_hf

    def mistaken(folder: Path, vocab_size: int) -> Callable[[Tensor], Tensor]:
        return lambda tokens: torch.zeros(len(tokens), vocab_size)

    monkeypatch.setattr(import_hf, "_transformers", mistaken)
    code, _, err = command("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "a")
    assert code == 1
    assert "FAIL" in err
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob(".a.tmp*"))


def test_without_transformers_a_float64_forward_is_the_yardstick(
    command: Command, source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run_import(command, source, tmp_path / "a")
    monkeypatch.undo()
    assert "transformers is not installed" in read_certificate(tmp_path / "a")["parity"]["against"]
    probe = read_probe(read_artifact(tmp_path / "a"))
    with torch.no_grad():
        exact = (
            gpt2(tokenizer.vocab_size).double()(torch.from_numpy(probe.tokens).long()).logits.flatten(0, 1)
        )
    assert float(abs(probe.logits - exact[probe.positions].numpy()).max()) <= 1e-6  # rounded to float32 once


def test_probe_is_text_of_the_data_set_and_fits_a_prepared_one(
    command: Command, source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The tokenizer of an imported model makes data, on which the import is then measured."""
    run_import(command, source, tmp_path / "a")
    lines = write_jsonl(tmp_path / "rows.jsonl", rows(60))
    base = ("--source", lines, "--val-fraction", 0.2)
    prepare = (*base, "--tokenizer", tmp_path / "a", "--out", tmp_path / "data")
    assert command("jaxgpt", "prepare", *prepare)[0] == 0
    assert load_tokenizer(tmp_path / "data").sha256 == tokenizer.sha256
    run_import(command, source, tmp_path / "a", "--data", tmp_path / "data", "--overwrite")
    assert "validation split" in read_certificate(tmp_path / "a")["probe"]
    other = (*base, "--tokenizer", "bpe:290", "--out", tmp_path / "other")
    assert command("jaxgpt", "prepare", *other)[0] == 0
    wrong = ("--source", source, "--out", tmp_path / "b", "--data", tmp_path / "other")
    assert_one_line_error(command("jaxgpt-export", "import-hf", *wrong), "another tokenizer", "--tokenizer")


def test_prepare_refuses_a_folder_without_a_tokenizer(command: Command, tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "rows.jsonl", rows(5))
    (tmp_path / "empty").mkdir()
    for name, part in ((tmp_path / "empty", "can't be read"), (tmp_path / "none", "is unknown")):
        call = ("--source", lines, "--tokenizer", name, "--out", tmp_path / "data")
        assert_one_line_error(command("jaxgpt", "prepare", *call), part)


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
