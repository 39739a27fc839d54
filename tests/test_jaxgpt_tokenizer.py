import copy
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.data.make_tokenizer import make_tokenizer
from jaxgpt.generation.text_stream import TextStream
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer

TEXTS = (
    "",
    " ",
    "def f(x):\n    return x  # don't\n",
    "日本語 🎉🎉 naïve\tcafé\r\n\x00",
    "<|endoftext|>",
    "a" * 100,
)


@pytest.fixture(scope="module")
def bpe(data: Path) -> Tokenizer:
    return load_tokenizer(data)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(bpe: Tokenizer, text: str) -> None:
    tokens = bpe.encode(text)
    assert bpe.decode(tokens) == text
    assert bpe.endoftext not in tokens


def test_gpt2_gives_the_published_tokens() -> None:
    tokenizer = gpt2_tokenizer()
    assert tokenizer.vocab_size == 50257
    assert tokenizer.endoftext == 50256
    # The model card of gpt2 and OpenAI's tokenizer page show these.
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]


def test_saved_tokenizer_json_gives_the_same_tokens_in_another_library(bpe: Tokenizer, data: Path) -> None:
    theirs = FastTokenizer.from_file(str(data / "tokenizer.json"))
    dataset = open_dataset(data)
    text = bpe.decode(token for token in dataset.val if token != bpe.endoftext)
    for piece in (*TEXTS[:4], text):
        assert theirs.encode(piece).ids == bpe.encode(piece)
    assert theirs.token_to_id("<|endoftext|>") == bpe.endoftext


def test_bpe_has_the_asked_size_and_is_the_same_every_time() -> None:
    texts = [f"value_{i} = compute(value_{i - 1})\n" * 3 for i in range(200)]
    first, second = make_tokenizer("bpe:300", texts), make_tokenizer("bpe:300", texts)
    assert first.vocab_size == 300
    assert first.sha256 == second.sha256
    assert first.sha256 != make_tokenizer("bpe:299", texts).sha256


@pytest.mark.parametrize("name", ["gpt3", "bpe", "bpe:", "bpe:12", "bpe:99999", "bpe:1e3"])
def test_impossible_tokenizer_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        make_tokenizer(name, ["text"])


def test_files_of_two_tokenizers_are_noticed(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab.pop("<|endoftext|>")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match=r"vocab\.json .* does not follow from merges\.txt"):
        load_tokenizer(tmp_path)


def test_damaged_merges_name_the_line(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    lines = (tmp_path / "merges.txt").read_text().split("\n")
    lines[5] = "broken"
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 6 is not a merge"):
        load_tokenizer(tmp_path)


def test_a_character_split_over_tokens_is_never_shown_broken(bpe: Tokenizer) -> None:
    text = "x = '日本 🎉'"
    tokens = bpe.encode(text)
    assert any("�" in bpe.decode([token]) for token in tokens)  # some token is half a character
    stream = TextStream(bpe)
    pieces = [stream.push(token) for token in tokens]
    assert all("�" not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


def test_bytes_that_never_become_a_character_are_replaced_at_the_end(bpe: Tokenizer) -> None:
    stream = TextStream(bpe)
    half = bpe.encode("🎉")[0]
    assert stream.push(half) == ""
    assert stream.finish() == "�"


@pytest.mark.parametrize("stop", [["```"], ["\n\n"], ["turn"], ["zzz"], ["```", "ret"], [""]])
def test_a_stop_string_split_over_tokens_is_not_shown(bpe: Tokenizer, stop: list[str]) -> None:
    text = "def f():\n    return 1\n``\n\nend ``` after"
    found = [text.find(s) for s in stop if s and s in text]
    expected = text[: min(found)] if found else text
    rng = random.Random(0)
    for _ in range(5):
        stream = TextStream(bpe, stop)
        tokens: list[int] = []
        rest = text
        while rest:  # cut the text anywhere, so that tokens are cut differently each time
            size = rng.randint(1, 4)
            tokens += bpe.encode(rest[:size])
            rest = rest[size:]
        shown = "".join(stream.push(token) for token in tokens) + stream.finish()
        assert shown == expected
        assert stream.text == expected
        assert stream.stopped == bool(found)


def test_a_copy_is_the_same_tokenizer(bpe: Tokenizer) -> None:
    other = copy.deepcopy(bpe)
    assert other.sha256 == bpe.sha256
    assert other.encode("def f(x):\n    return x") == bpe.encode("def f(x):\n    return x")


def test_a_merge_that_is_there_twice_is_named(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges + merges.splitlines()[1] + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="two merges give the same token"):
        load_tokenizer(tmp_path)
