"""Texts and merges that a library can not take, and tokens that are reserved beside the others."""

import random
from pathlib import Path

import pytest
from test_jaxgpt_tokenizer_folders import ENDOFTEXT, added_tokens, assert_like_transformers, edit, gpt2
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer, backends, load_tokenizer, spell

transformers = pytest.importorskip("transformers")


def test_long_white_space_is_cut_where_the_pattern_cuts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with tiktoken alone, for runs that it can take."""
    tokenizer, generator = gpt2(), random.Random(0)
    monkeypatch.setattr(backends, "LONGEST_SPACE", 5)
    spaces = [" ", " ", "\n", "\t", "\u3000", "\x85", "\x1c"]
    for _ in range(400):
        runs = ["".join(generator.choices(spaces, k=generator.randint(0, 12))) for _ in range(4)]
        text = "".join(run + generator.choice(["", "a", "'s", "1", "!", "é"]) for run in runs)
        assert tokenizer.encode(text) == tokenizer._backend._encoding.encode_ordinary(text), repr(text)


def test_a_million_spaces_are_encoded() -> None:
    """tiktoken's regular expression gives up on them."""
    tokenizer = gpt2()
    tokens = tokenizer.encode("first" + " " * 1_010_000 + "last")
    assert tokenizer.decode(tokens[:1] + tokens[-1:]) == "first last"
    assert set(tokens[1:-1]) <= set(tokenizer.encode(" " * 100_000) + tokenizer.encode(" "))
    assert tokenizer.encode_batch(["first" + " " * 1_010_000 + "last", "x"], 2) == [tokens, [87]]


def test_a_panic_of_a_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """What pyo3 raises."""

    def panic(*_: object, **__: object) -> list[int]:
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    tokenizer = gpt2()
    monkeypatch.setattr(tokenizer._backend._encoding, "encode_ordinary", panic)
    with pytest.raises(UserError, match="a text of 4 characters, 'abcd'"):
        tokenizer.encode("abcd")


def test_merges_that_tiktoken_would_not_follow_run_on_tokenizers() -> None:
    """tiktoken joins two neighbours whenever together they are a token, whatever pair its merge names."""
    generator = random.Random(0)
    found = {"tiktoken": 0, "tokenizers": 0}
    for _ in range(150):
        tokens, merges = list("abc"), []
        for _ in range(generator.randint(1, 10)):
            pair = (generator.choice(tokens), generator.choice(tokens))
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
                merges.append(" ".join(pair))
        tokenizer = Tokenizer(merges, "random")
        theirs = FastTokenizer(models.BPE(tokenizer.vocab(), [tuple(merge.split(" ")) for merge in merges]))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found[tokenizer.backend] += 1
        for _ in range(60):
            text = "".join(generator.choices("abc", k=generator.randint(1, 14)))
            assert tokenizer.encode(text) == theirs.encode(text).ids
    assert min(found.values()) > 20


def test_reserved_tokens_follow_the_last_id_and_are_found_only_where_asked() -> None:
    tokenizer = gpt2().with_special(["<|user|>", "<|assistant|>"])
    assert tokenizer.special_tokens == {ENDOFTEXT: 50256, "<|user|>": 50257, "<|assistant|>": 50258}
    text = f"<|user|>Hello world{ENDOFTEXT}"
    plain = gpt2().encode
    assert tokenizer.encode(text, special=True) == [50257, 15496, 995, 50256]
    assert tokenizer.encode(text, special=["<|user|>"]) == [50257, 15496, 995, *plain(ENDOFTEXT)]
    assert tokenizer.encode(text) == plain(text)
    assert tokenizer.with_special(["<|user|>"]) is tokenizer
    assert tokenizer.sha256 != gpt2().sha256


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["<a>", "<a>"], "of its own"),
        ([" "], "of its own"),
        (["\ud83d"], "of its own"),
        ([ENDOFTEXT], "leave it out"),
        (["the"], "ordinary token"),
    ],
)
def test_names_that_can_not_be_reserved_are_refused(names: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        Tokenizer([f"{spell(b't')} h", "th e"], "small").with_special(names)


def test_tokens_reserved_beside_a_folder_s_own_are_there_for_transformers(tmp_path: Path) -> None:
    added_tokens(tmp_path)
    edit(
        tmp_path / "tokenizer_config.json",
        lambda v: v.update(chat_template="{{ messages }}", eos_token="<pad>"),
    )
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "added_tokens.json").unlink()
    tokenizer = load_tokenizer(tmp_path).with_special(["<|user|>"])
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out", 32)
    (tmp_path / "out" / "config.json").write_text('{"model_type": "gpt2"}')
    assert load_tokenizer(tmp_path / "out").sha256 == tokenizer.sha256
    assert_like_transformers(tokenizer, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"
