"""Tokenizers travel: folder -> artifact -> data, and reserved tokens -> data -> run -> artifact -> text."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_SHAPE, TINY_TRAIN, Command, assert_one_line_error, rows, write_jsonl
from jaxgpt_export.format.artifact import read_artifact, read_certified_artifact
from jaxgpt_export.format.certificate import read_certificate
from jaxgpt_export.llm import LLM
from small_gpt2 import assert_same_in_transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.data.make_tokenizer import make_tokenizer
from jaxgpt.generation.state import prompt_tokens
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [row["text"] for row in rows(60)]
TEXT = "def mean(values):\n    return  1 / 2024  # naïve 日本\r\n"
ENDOFTEXT = "<|endoftext|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
CHAT = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"


def gpt2(vocab_size: int, **settings: Any) -> Any:
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=vocab_size, **{**shape, **ends, **settings})
    return transformers.GPT2LMHeadModel(config).eval()


def trained(before: pre_tokenizers.PreTokenizer) -> FastTokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = before, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[ENDOFTEXT, USER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(TEXTS, trainer)
    return fast


def byte_level(**options: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def by_spaces() -> pre_tokenizers.PreTokenizer:
    """Cuts text at single spaces and digits only, as no GPT-2 does."""
    cut = pre_tokenizers.Split(Regex(r" |\d"), "isolated")
    return pre_tokenizers.Sequence([cut, byte_level(use_regex=False)])


def hf_folder(folder: Path, before: pre_tokenizers.PreTokenizer, rows_of_table: int = 400) -> Path:
    """A folder as the Hub has it: special tokens first, a chat template, what transformers writes."""
    gpt2(rows_of_table).save_pretrained(folder)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained(before), eos_token=ENDOFTEXT, chat_template=CHAT
    )
    theirs.save_pretrained(folder)
    return folder


def imports(command: Command, source: Path, out: Path, *more: object) -> str:
    code, _, err = command("jaxgpt-export", "import-hf", "--source", source, "--out", out, *more)
    assert code == 0, err
    return err


@pytest.mark.parametrize("before", [byte_level, by_spaces])
@pytest.mark.parametrize("padding", [0, 48])
def test_a_folder_with_its_special_token_first_comes_in_and_goes_out(
    command: Command, tmp_path: Path, before: Callable[[], Any], padding: int
) -> None:
    source = hf_folder(tmp_path / "hf", before(), 400 + padding)
    imports(command, source, tmp_path / "a")
    artifact = read_certified_artifact(tmp_path / "a")
    tokenizer = artifact.tokenizer()
    assert tokenizer.backend == ("tiktoken" if before is byte_level else "tokenizers")
    assert (artifact.config.vocab_size, tokenizer.endoftext) == (400, 0)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    text = f"{USER}{TEXT}{ENDOFTEXT}"
    assert tokenizer.encode(text, special=True) == theirs(text).input_ids == ours(text).input_ids
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (source / name).read_bytes()
    assert ours.chat_template == CHAT
    assert ours.model_max_length == 32
    was, now = (transformers.AutoModelForCausalLM.from_pretrained(each) for each in (source, tmp_path / "a"))
    tokens = ours("mean list " * 60, truncation=True, return_tensors="pt").input_ids
    assert_same_in_transformers(was, now, tokens, 400)  # the table keeps the folder's order
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "a" / name).read_text())
        assert (said["bos_token_id"], said["eos_token_id"]) == (0, 0)
    # The artifact's tokenizer makes data, its data set trains, and a second import gives the same files.
    assert command("jaxgpt-export", "verify", "--artifact", tmp_path / "a")[0] == 0
    imports(command, tmp_path / "a", tmp_path / "b")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_without_a_class_tokenizer_json_decides_and_the_artifact_says_so(
    command: Command, tmp_path: Path
) -> None:
    source = hf_folder(tmp_path / "hf", by_spaces())
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()
    assert "names no tokenizer_class" in imports(command, source, tmp_path / "a")
    ids = FastTokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids
    assert read_artifact(tmp_path / "a").tokenizer().encode(TEXT) == ids
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "a")(TEXT).input_ids == ids


def test_a_folder_that_transformers_reads_otherwise_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hf_folder(tmp_path / "hf", byte_level())
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, special=False: [1, 2, 3])
    call = command("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "a")
    assert_one_line_error(call, "gives other tokens in transformers than here")
    assert not (tmp_path / "a").exists()


def test_a_folder_without_a_tokenizer_takes_one(command: Command, tmp_path: Path) -> None:
    tokenizer, source = make_tokenizer("bpe:300", TEXTS), tmp_path / "hf"
    gpt2(304).save_pretrained(source)
    (tmp_path / "tokens").mkdir()
    tokenizer.save(tmp_path / "tokens")
    base = ("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "a", "--tokenizer")
    assert command(*base, tmp_path / "tokens")[0] == 0
    assert read_artifact(tmp_path / "a").tokenizer().sha256 == tokenizer.sha256
    assert_one_line_error(command(*base, "gpt2", "--overwrite"), "304 tokens, the tokenizer 50257")
    assert_one_line_error(command(*base, "gpt3", "--overwrite"), "'gpt3' is neither gpt2 nor a folder")
    assert_one_line_error(command(*base, source, "--overwrite"), "tokenizer in", "can't be read")
    tokenizer.save(source)
    assert_one_line_error(command(*base, "gpt2", "--overwrite"), "a tokenizer of its own", "--tokenizer")


def test_gpt2_s_tokenizer_fits_a_folder_of_its_size(command: Command, tmp_path: Path) -> None:
    gpt2(50304, n_embd=8, n_positions=8).save_pretrained(tmp_path / "hf")
    err = imports(command, tmp_path / "hf", tmp_path / "a", "--tokenizer", "gpt2")
    assert "rows 50257 to 50303 of the vocabulary are no token" in err
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert theirs("Hello world<|endoftext|>").input_ids == [15496, 995, 50256]
    settings = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert settings == {
        "add_prefix_space": False, "bos_token": ENDOFTEXT, "clean_up_tokenization_spaces": False,
        "eos_token": ENDOFTEXT, "pad_token": ENDOFTEXT, "tokenizer_class": "GPT2TokenizerFast",
        "unk_token": ENDOFTEXT, "model_max_length": 8,
    }  # fmt: skip


def test_models_of_characters_are_refused_by_name(command: Command, tmp_path: Path) -> None:
    """nanoGPT's first example: 65 characters, listed in meta.pkl, which is not read."""
    state = {
        name: tensor.t().contiguous()
        if name.endswith(("attn.weight", "proj.weight", "fc.weight"))
        else tensor
        for name, tensor in gpt2(65).state_dict().items()
    }
    arguments = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "bias": True, "vocab_size": 65}
    torch.save({"model": state, "model_args": arguments}, tmp_path / "ckpt.pt")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))
    gpt2(65).save_pretrained(tmp_path / "hf")
    for program, source in (("import-nanogpt", "ckpt.pt"), ("import-hf", "hf")):
        for name in ("gpt2", tmp_path / "data"):
            call = ("--source", tmp_path / source, "--tokenizer", name, "--out", tmp_path / "a")
            result = command("jaxgpt-export", program, *call)
            assert_one_line_error(
                result, "a model of characters", "can't be imported", "prepare --tokenizer bpe"
            )
    assert not (tmp_path / "a").exists()


def test_the_certificate_covers_every_file_that_decides_ids(command: Command, tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf", byte_level())
    (source / "added_tokens.json").write_text(json.dumps({USER: 1}))
    imports(command, source, tmp_path / "a")
    files = read_certificate(tmp_path / "a")["files"]
    assert {"tokenizer_config.json", "added_tokens.json", "chat_template.jinja", "vocab.json"} <= files.keys()
    for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        (tmp_path / "b" / name).write_text("{}")
        with pytest.raises(UserError, match=f"{name} changed since certificate"):
            read_certified_artifact(tmp_path / "b")
        shutil.rmtree(tmp_path / "b")


def test_an_artifact_of_before_takes_settings_that_its_certificate_does_not_name(
    fp32: Path, tmp_path: Path
) -> None:
    """Older artifacts have no tokenizer_config.json; people added one by hand."""
    shutil.copytree(fp32, tmp_path / "a")
    path = tmp_path / "a" / "certificate.json"
    value = json.loads(path.read_text())
    del value["files"]["tokenizer_config.json"]
    path.write_text(json.dumps(value))
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    assert (
        read_certified_artifact(tmp_path / "a").tokenizer().sha256 == read_artifact(fp32).tokenizer().sha256
    )
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    read_certified_artifact(tmp_path / "a")


def test_gguf_refuses_what_llama_cpp_would_run_otherwise(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    imports(command, hf_folder(tmp_path / "hf", by_spaces()), tmp_path / "a")
    call = ("jaxgpt-export", "gguf", "--artifact", tmp_path / "a", "--out", tmp_path / "a.gguf")
    assert_one_line_error(command(*call), "splits text otherwise than GPT-2")
    make_tokenizer("bpe:257", TEXTS).save(tmp_path / "hf")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "hf" / name).unlink()
    imports(command, tmp_path / "hf", tmp_path / "a", "--overwrite")
    assert_one_line_error(command(*call), "has no merges")
    assert not (tmp_path / "a.gguf").exists()


def test_gguf_marks_special_tokens_wherever_they_are(command: Command, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    imports(command, hf_folder(tmp_path / "hf", byte_level()), tmp_path / "a")
    call = ("--artifact", tmp_path / "a", "--out", tmp_path / "a.gguf")
    assert command("jaxgpt-export", "gguf", *call)[0] == 0
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[:2] == [ENDOFTEXT, USER]
    assert fields["tokenizer.ggml.token_type"].contents() == [3, 3] + [1] * 398
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0


def test_a_tokenizer_that_needs_tokenizers_says_so_where_it_is_not_installed(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imports(command, hf_folder(tmp_path / "hf", by_spaces()), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    call = ("--artifact", tmp_path / "a", "--prompt", "x", "--max-new-tokens", 2)
    assert_one_line_error(command("jaxgpt-export", "generate", *call), "needs tokenizers", ".[hf]")
    with pytest.raises(UserError, match=r"a needs tokenizers, which is not installed; pip .*\.\[hf\]"):
        LLM.load(tmp_path / "a")


def chats(count: int) -> list[dict[str, str]]:
    return [
        {"text": f"{USER}{row['text']} {i}{ASSISTANT}yes{ENDOFTEXT}"} for i, row in enumerate(rows(count))
    ]


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with reserved tokens."""
    from conftest import run_command

    folder = tmp_path_factory.mktemp("chats")
    source = write_jsonl(folder / "chats.jsonl", chats(200))
    call = ("--source", source, "--tokenizer", "bpe:320", "--val-fraction", 0.2, "--out", folder / "data")
    assert run_command("jaxgpt", "prepare", *call, "--special", USER, ASSISTANT) == 0
    return folder / "data"


def test_prepare_counts_reserved_tokens_and_reads_them_in_documents(chat_data: Path) -> None:
    dataset, tokenizer = open_dataset(chat_data), load_tokenizer(chat_data)
    assert tokenizer.special_tokens == {ENDOFTEXT: 317, USER: 318, ASSISTANT: 319}
    assert tokenizer.vocab_size == dataset.vocab_size == 320
    assert dataset.manifest["tokenizer"]["special"] == [USER, ASSISTANT]
    counts = dataset.manifest["counts"]
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        documents = counts[f"{split}_documents"]
        assert (tokens == 318).sum() == (tokens == 319).sum() == documents
        assert (tokens == 317).sum() == documents + 1  # written in a document it is ordinary text
    assert not any("user" in token or "|>" in token for token in list(tokenizer.vocab())[256:317])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(chat_data / "tokenizer.json"))
    text = chats(1)[0]["text"]
    assert theirs(text).input_ids == tokenizer.encode(text, special=True)


def test_reserved_tokens_follow_those_of_gpt2_and_of_a_folder(
    command: Command, chat_data: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "chats.jsonl", chats(40))
    base = (
        "--source",
        source,
        "--val-fraction",
        0.3,
        "--overwrite",
        "--out",
        tmp_path / "data",
        "--special",
        USER,
    )
    assert command("jaxgpt", "prepare", *base, "--tokenizer", "gpt2")[0] == 0
    dataset = open_dataset(tmp_path / "data")
    assert dataset.vocab_size == 50258
    assert (np.asarray(dataset.val) == 50257).sum() == dataset.manifest["counts"]["val_documents"]
    # Those that a folder has are used; only the ones that are named are read.
    assert command("jaxgpt", "prepare", *base, "--tokenizer", chat_data)[0] == 0
    assert open_dataset(tmp_path / "data").tokenizer_sha256 == open_dataset(chat_data).tokenizer_sha256
    assert 319 not in open_dataset(tmp_path / "data").train
    assert command("jaxgpt", "prepare", *base, "<|system|>", "--tokenizer", chat_data)[0] == 0
    assert load_tokenizer(tmp_path / "data").special_tokens["<|system|>"] == 320
    for name, part in ((ENDOFTEXT, "leave it out"), (" ", "of its own"), ("the", "ordinary token")):
        call = command("jaxgpt", "prepare", *base, name, "--tokenizer", "gpt2")
        assert_one_line_error(call, "special token", part)
    few = command("jaxgpt", "prepare", *base, "--tokenizer", "bpe:257")
    assert_one_line_error(few, "N must lie in 258 to 65536")


def test_reserved_tokens_go_through_training_conversion_and_generation(
    command: Command, chat_data: Path, tmp_path: Path
) -> None:
    brief = (*TINY_TRAIN, "--max-steps", 4, "--sample-every", 0)
    base = ("tiny", "--data", chat_data, *TINY_SHAPE, *brief)
    assert command("jaxgpt", "train", *base, "--out", tmp_path / "run")[0] == 0
    sampled = ("--prompt", f"{USER}a list", "--max-new-tokens", 2)
    assert command("jaxgpt", "sample", "--run", tmp_path / "run", *sampled)[0] == 0
    assert command("jaxgpt-export", "convert", "--run", tmp_path / "run", "--out", tmp_path / "a")[0] == 0
    tokenizer = read_certified_artifact(tmp_path / "a").tokenizer()
    assert tokenizer.sha256 == load_tokenizer(chat_data).sha256
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    prompt = f"{USER}a list{ASSISTANT}"
    tokens = prompt_tokens(tokenizer, prompt, 64)
    assert tokens == theirs(prompt).input_ids
    assert (tokens[0], tokens[-1]) == (318, 319)
    method = ("--method", "int8-weight-only", "--out", tmp_path / "int8")
    assert command("jaxgpt-export", "quantize", "--artifact", tmp_path / "a", *method)[0] == 0
    for artifact in (tmp_path / "a", tmp_path / "int8"):
        call = ("--artifact", artifact, "--prompt", prompt, "--max-new-tokens", 4, "--json")
        code, out, err = command("jaxgpt-export", "generate", *call)
        assert code == 0, err
        done = json.loads(out)
        assert done["text"] == tokenizer.decode(done["tokens"])
    # Trained on: the artifact's tokenizer is the data set's.
    more = ("--init", tmp_path / "a", "--out", tmp_path / "more", *brief)
    assert command("jaxgpt", "train", "tiny", "--data", chat_data, *more)[0] == 0
