"""Models of other programs become artifacts that compute the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, assert_one_line_error, rows, write_jsonl
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.certificate import read_certificate
from jaxgpt_export.format.probe import read_probe
from jaxgpt_export.parity.comparison import compare_models
from jaxgpt_export.parity.models import open_model
from jaxgpt_export.parity.probe_gates import MAX_FP32_LOGIT_DIFF
from safetensors.torch import load_file, save_file
from small_gpt2 import FLOAT32_TOLERANCE, assert_same, gpt2, run_import, save, small_tokenizer, tokens_for
from torch import Tensor

from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")
PAD = 7  # rows of a padded vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture
def source(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A Hugging Face folder with a tied head."""
    return save(gpt2(tokenizer.vocab_size), tokenizer, tmp_path / "hf")


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
    refused(lambda v: v["model"].pop("merges"), "damaged")
    # A token without a row in the table: its id is what is wrong, wherever the file has it.
    path.write_text(
        json.dumps({**value, "model": value["model"] | {"vocab": value["model"]["vocab"] | {"<pad>": 900}}})
    )
    call = command("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "b")
    assert_one_line_error(call, "the model has 300 tokens, the tokenizer 901")
    path.unlink()
    call = command("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "b")
    assert_one_line_error(call, "holds no tokenizer", "merges.txt")


def test_masks_and_other_heads_are_left_out_here_and_in_a_comparison(
    command: Command, source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = source / "model.safetensors"
    more = {f"{name}.weight": torch.zeros(1, 32) for name in ("multiple_choice_head.summary", "score")}
    more["v_head.summary.bias"] = torch.zeros(1)
    masks = {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in (0, 1)}
    save_file({**load_file(path), **more, **masks}, path, metadata={"format": "pt"})
    said = run_import(command, source, tmp_path / "a")
    assert (
        "multiple_choice_head.summary.weight, score.weight, v_head.summary.bias are of another head" in said
    )
    assert "masked_bias" not in said
    assert_same(gpt2(tokenizer.vocab_size), tmp_path / "a", tokenizer, True)
    tokens = tokens_for(tokenizer.vocab_size)
    compared = compare_models(open_model(source), open_model(tmp_path / "a"), tokens)
    assert compared.parity.max_abs_logit_diff <= FLOAT32_TOLERANCE


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
    edited(lambda t: t.update({"adapter.weight": torch.ones(2, 32)}))
    refused("unexpected tensors: adapter.weight")
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
    from jaxgpt_export.interchange import hf_folder

    def mistaken(folder: Path, vocab_size: int) -> Callable[[Tensor], Tensor]:
        return lambda tokens: torch.zeros(len(tokens), vocab_size)

    monkeypatch.setattr(hf_folder, "transformers_reference", mistaken)
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


def test_of_a_long_context_the_tokens_of_a_probe_are_compared_and_no_more(
    command: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxgpt_export.interchange.imported_model.PROBE_TOKENS", 10)
    said = run_import(command, source, tmp_path / "a")
    assert "on 10 positions" in said
    probe = read_probe(read_artifact(tmp_path / "a"))
    assert probe.tokens.shape == (1, 10)
    assert probe.positions.tolist() == list(range(10))
    assert command("jaxgpt-export", "verify", "--artifact", tmp_path / "a")[0] == 0


def test_the_bound_that_was_passed_is_said_with_its_digits(
    command: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxgpt_export.interchange import hf_folder

    def mistaken(folder: Path, vocab_size: int) -> Callable[[Tensor], Tensor]:
        return lambda tokens: torch.full((len(tokens), vocab_size), 16.0)

    monkeypatch.setattr(hf_folder, "transformers_reference", mistaken)
    code, _, err = command("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "a")
    assert code == 1
    assert "at most 1.6e-04 is allowed" in err


def test_the_tokenizer_that_was_given_is_named_to_prepare_with(
    command: Command, source: Path, tokenizer: Tokenizer, tmp_path: Path
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
    call = ("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "a")
    data = ("--data", tmp_path / "other")
    assert_one_line_error(command(*call, *data), f"jaxgpt prepare --tokenizer {source}")
    given = tmp_path / "given"
    given.mkdir()
    tokenizer.save(given)
    for name in ("vocab.json", "merges.txt"):
        (source / name).unlink()
    found = command(*call, "--tokenizer", given, *data)
    assert_one_line_error(found, f"jaxgpt prepare --tokenizer {given}")
