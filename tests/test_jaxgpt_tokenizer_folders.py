"""Every kind of byte-level BPE folder gives the ids of transformers' AutoTokenizer, or is refused by name."""

import copy
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import rows
from tokenizers import AddedToken as FastAddedToken
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")

# How GPT-4 cuts text.
OTHER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXTS = [row["text"] for row in rows(60)]
ENDOFTEXT = "<|endoftext|>"
PIECES = [
    *(chr(n) for n in range(33)), "\x7f", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\ufeff", "\u200b",
    "  ", "    ", "\n\n", "\r\n", "\t\t", " " * 17, "a", "B", "the", " return", "'s", "'LL", "don't", "1",
    "2024", "½", "Ⅻ", "٣", "é", "e\u0301", "日本", "рус", "ไท", "ال", "🎉", "👨\u200d👩", "_", "==", "```",
    "\\", '"', "Ġ", "Ċ", "<|", "|>", "<|endoftext", ENDOFTEXT, "<|user|>", "<|user|>x", "<pad>", "<s>",
    "</s>", "LIST", "<mask>",
]  # fmt: skip


def hard_texts(count: int = 100) -> list[str]:
    generator = random.Random(0)
    made = ["".join(generator.choices(PIECES, k=generator.randint(1, 25))) for _ in range(count)]
    return ["", " ", *PIECES, *made, *TEXTS[:5]]


def trained(
    before: pre_tokenizers.PreTokenizer | None = None, special: tuple[str, ...] = (ENDOFTEXT,), **options: Any
) -> FastTokenizer:
    """What `tokenizers` trains: special tokens first, then the bytes, then the merges."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = before or pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    options = {"vocab_size": 400, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} | options
    trainer = trainers.BpeTrainer(special_tokens=list(special), show_progress=False, **options)
    fast.train_from_iterator(TEXTS, trainer)
    return fast


def saved(fast: FastTokenizer, folder: Path, **settings: Any) -> None:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **settings)
    theirs.save_pretrained(folder)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def digits() -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def split() -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(OTHER_PATTERN), "isolated"), byte_level])


gpt2 = functools.cache(gpt2_tokenizer)


@functools.cache
def small() -> Tokenizer:
    from jaxgpt.data.make_tokenizer import make_tokenizer

    return make_tokenizer("bpe:300", TEXTS)


def two_files(fast: FastTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt alone."""
    model = json.loads(fast.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")


def added_tokens(folder: Path) -> None:
    """A GPT-2 fine-tuned with more tokens, in the files of older folders."""
    tokenizer = small()
    tokenizer.save(folder)
    (folder / "tokenizer.json").unlink()
    V = tokenizer.vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<s>": V, "<pad>": V + 1, "LIST": V + 2}))
    named = {"bos_token": "<s>", "eos_token": ENDOFTEXT, "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))


def stripping(folder: Path) -> None:
    """Tokens that take white space with them, that are not special, or begin alike."""
    fast = trained()
    fast.add_tokens(["LIST", FastAddedToken("<mask>", lstrip=True), FastAddedToken("==", normalized=False)])
    fast.add_special_tokens([FastAddedToken("<|user|>", rstrip=True, lstrip=True), "<|user|>x", "<|"])
    saved(fast, folder, eos_token=ENDOFTEXT)


def added_by_settings(folder: Path) -> None:
    """Special tokens that only tokenizer_config.json names: transformers adds them at the end."""
    saved(trained(), folder, eos_token=ENDOFTEXT)
    named = {"pad_token": "<pad>", "extra_special_tokens": ["<|user|>"]}
    edit(folder / "tokenizer_config.json", lambda v: v.update(named))


def crossed(folder: Path) -> None:
    """Merges that tiktoken would not follow: it would make ` the` of ` t` and `he` too."""
    merges = ["h e", "Ġ t", "Ġt h", "Ġth e", "a b", "b c", "ab c"]
    Tokenizer(merges, "crossed").save(folder)


def padded(folder: Path) -> None:
    fast = trained()
    saved(fast, folder, eos_token=ENDOFTEXT)
    edit(folder / "tokenizer.json", lambda v: v["model"]["vocab"].update(unused0=400, unused1=401))


def ignore_merges(folder: Path) -> None:
    saved(trained(split()), folder, eos_token=ENDOFTEXT)
    edit(folder / "tokenizer.json", lambda v: v["model"].update(ignore_merges=True))
    edit(folder / "tokenizer.json", lambda v: v["model"]["vocab"].update(LIST=400))


def retrained(folder: Path) -> None:
    """What transformers itself trains from a GPT-2 tokenizer."""
    tokenizer = small()
    merges = [tuple(line.split(" ")) for line in tokenizer.merges_text().splitlines()[1:]]
    theirs = transformers.GPT2Tokenizer(tokenizer.vocab(), merges)
    theirs.train_new_from_iterator(TEXTS, 400).save_pretrained(folder)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gpt2": (lambda f: gpt2().save(f, 1024), "tiktoken"),
    "trained here": (lambda f: small().save(f, 32), "tiktoken"),
    "reserved": (lambda f: small().with_special(["<|user|>", "<pad>"]).save(f, 32), "tiktoken"),
    "special token first": (lambda f: saved(trained(), f, eos_token=ENDOFTEXT), "tiktoken"),
    "retrained GPT-2": (retrained, "tiktoken"),
    "two files": (lambda f: two_files(trained(), f), "tiktoken"),
    "five special tokens first": (
        lambda f: saved(
            trained(special=("<s>", "<pad>", "</s>", "<unk>", "<mask>")), f, eos_token="</s>", bos_token="<s>"
        ),
        "tiktoken",
    ),
    "added tokens": (added_tokens, "tiktoken"),
    "stripping": (stripping, "tiktoken"),
    "added by settings": (added_by_settings, "tiktoken"),
    "padded": (padded, "tiktoken"),
    "digits": (lambda f: saved(trained(digits()), f, eos_token=ENDOFTEXT), "tokenizers"),
    "GPT-4's split": (lambda f: saved(trained(split()), f, eos_token=ENDOFTEXT), "tokenizers"),
    "ignore_merges": (ignore_merges, "tokenizers"),
    "crossed merges": (crossed, "tokenizers"),
    "bytes missing": (
        lambda f: saved(trained(initial_alphabet=[]), f, eos_token=ENDOFTEXT, unk_token=ENDOFTEXT),
        "tokenizers",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder that no test changes, and the library that is to run it."""
    make, backend = FOLDERS[request.param]
    path = tmp_path_factory.mktemp("folder")
    make(path)
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    return path, backend


def assert_like_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = hard_texts()
    for text in texts:
        assert tokenizer.encode(text, special=True) == theirs(text).input_ids, repr(text)
        plain = theirs(text, split_special_tokens=True).input_ids
        assert tokenizer.encode(text) == plain, repr(text)
    for special in (True, False):
        each = [tokenizer.encode(text, special) for text in texts]
        assert tokenizer.encode_batch(texts, 2, special) == each
    assert tokenizer.endoftext == theirs.eos_token_id
    assert tokenizer.bos == (theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id)
    assert all(theirs.convert_ids_to_tokens(i) == name for name, i in tokenizer.special_tokens.items())


def test_ids_are_those_of_transformers(folder: tuple[Path, str]) -> None:
    tokenizer = load_tokenizer(folder[0])
    assert tokenizer.backend == folder[1]
    assert_like_transformers(tokenizer, folder[0])


def test_saved_files_are_those_that_were_read_and_give_the_same_ids(
    folder: tuple[Path, str], tmp_path: Path
) -> None:
    tokenizer, out = load_tokenizer(folder[0]), tmp_path / "out"
    out.mkdir()
    tokenizer.save(out, 32)
    for path in folder[0].iterdir():
        if path.name not in ("config.json", "tokenizer_config.json"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    again = load_tokenizer(out)
    assert (again.sha256, again.endoftext, again.bos) == (
        tokenizer.sha256,
        tokenizer.endoftext,
        tokenizer.bos,
    )
    (out / "config.json").write_text('{"model_type": "gpt2"}')
    assert_like_transformers(tokenizer, out)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert len(theirs("mean list " * 60, truncation=True).input_ids) <= 32 == theirs.model_max_length


def test_text_survives_and_special_tokens_are_shown_but_the_last(folder: tuple[Path, str]) -> None:
    tokenizer = load_tokenizer(folder[0])
    layout = tokenizer.layout
    if layout.has_every_byte and not any(token.lstrip or token.rstrip for token in layout.added):
        for text in hard_texts(50):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    for name, i in tokenizer.special_tokens.items():
        assert tokenizer.decode([i]) == ("" if i == tokenizer.endoftext else name)


def test_a_copy_of_any_tokenizer_is_the_same(folder: tuple[Path, str]) -> None:
    tokenizer = load_tokenizer(folder[0])
    other = copy.deepcopy(tokenizer)
    assert (other.sha256, other.backend) == (tokenizer.sha256, tokenizer.backend)
    assert other.encode(TEXTS[0], special=True) == tokenizer.encode(TEXTS[0], special=True)


def test_an_id_that_no_token_has_decodes_to_nothing(tmp_path: Path) -> None:
    two_files(trained(), tmp_path)
    edit(tmp_path / "vocab.json", lambda v: v.update(unused=405))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 406
    assert [tokenizer.decode([i]) for i in (403, 404, 405)] == ["", "", "unused"]
    with pytest.raises(KeyError):
        tokenizer.token_bytes(406)


def test_identity_is_of_what_decides_ids_not_of_its_spelling(tmp_path: Path) -> None:
    """The same tokens, written as two files or as one, with merges as lines or as pairs."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    tokenizer = small()
    tokenizer.save(tmp_path / "a")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "a" / name).unlink()
    edit(
        tmp_path / "a" / "tokenizer.json",
        lambda v: v["model"].update(merges=[merge.split(" ") for merge in v["model"]["merges"]]),
    )
    assert load_tokenizer(tmp_path / "a").sha256 == tokenizer.sha256
    fast = trained()
    two_files(fast, tmp_path / "b")
    saved(fast, tmp_path / "c", eos_token=ENDOFTEXT)
    first, second = load_tokenizer(tmp_path / "b"), load_tokenizer(tmp_path / "c")
    assert first.sha256 == second.sha256 != tokenizer.sha256
    edit(tmp_path / "c" / "tokenizer.json", lambda v: v["added_tokens"][0].update(rstrip=True))
    assert load_tokenizer(tmp_path / "c").sha256 != second.sha256


def template(value: dict[str, Any]) -> None:
    begin = {"SpecialToken": {"id": ENDOFTEXT, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    value["post_processor"] = {
        "type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text],
        "special_tokens": {ENDOFTEXT: {"id": ENDOFTEXT, "ids": [0], "tokens": [ENDOFTEXT]}},
    }  # fmt: skip


def before(value: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    return lambda v: v.update(pre_tokenizer=value)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WHITESPACE = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, BYTE_LEVEL]}
REMOVED = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "normalizer": ("tokenizer.json", lambda v: v.update(normalizer={"type": "Lowercase"}), "a normalizer"),
    "template": ("tokenizer.json", template, "a post_processor that adds tokens"),
    "prefix space": ("tokenizer.json", before(BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space"),
    "metaspace": ("tokenizer.json", before(METASPACE), "after Metaspace"),
    "no pre-tokenizer": ("tokenizer.json", lambda v: v.update(pre_tokenizer=None), "no pre-tokenizer"),
    "lost spaces": ("tokenizer.json", before(WHITESPACE), "pre-tokenizer WhitespaceSplit"),
    "removed": (
        "tokenizer.json",
        before({"type": "Sequence", "pretokenizers": [REMOVED, BYTE_LEVEL]}),
        "pre-tokenizer Split Removed",
    ),
    "unigram": ("tokenizer.json", lambda v: v["model"].update(type="Unigram"), "Unigram"),
    "suffix": ("tokenizer.json", lambda v: v["model"].update(end_of_word_suffix="x"), "end_of_word_suffix"),
    "dropout": ("tokenizer.json", lambda v: v["model"].update(dropout=0.1), "dropout"),
    "single word": (
        "tokenizer.json", lambda v: v["added_tokens"][0].update(single_word=True), "single_word"
    ),
    "decoder": ("tokenizer.json", lambda v: v.update(decoder={"type": "WordPiece"}), "decoder"),
    "twice": ("tokenizer.json", lambda v: v["model"]["vocab"].update(x_x=7), "two tokens the same id"),
    "no number": ("tokenizer.json", lambda v: v["model"]["vocab"].update(x_x="7"), "the id '7'"),
    "too large": ("tokenizer.json", lambda v: v["model"]["vocab"].update(x_x=65536), "at most 65536 fit"),
    "unknown part": ("tokenizer.json", lambda v: v["model"]["merges"].append(["日", "a"]), "not a merge"),
    "merge of nothing": ("tokenizer.json", lambda v: v["model"]["merges"].append(["zq", "z"]), "lacks 'zqz'"),
    "other id": ("tokenizer.json", lambda v: v["added_tokens"][0].update(id=9), "the id 9"),
    "settings' space": ("tokenizer_config.json", lambda v: v.update(add_prefix_space=True), "prefix_space"),
    "settings' start": ("tokenizer_config.json", lambda v: v.update(add_bos_token=True), "add_bos_token"),
    "other class": (
        "tokenizer_config.json", lambda v: v.update(tokenizer_class="LlamaTokenizer"), "'LlamaTokenizer'"
    ),
    "half a character": ("tokenizer.json", lambda v: v["model"]["vocab"].update({"\ud83d": 7}), "lone surr"),
    "not a text": ("tokenizer_config.json", lambda v: v.update(eos_token=7), "is damaged"),
    "number far off": (
        "tokenizer_config.json",
        lambda v: v.update(added_tokens_decoder={"500": {"content": "<x>", "special": True}}),
        "would give it 400",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, what: str) -> None:
    name, change, part = REFUSED[what]
    saved(trained(), tmp_path, eos_token=ENDOFTEXT)
    edit(tmp_path / name, change)
    with pytest.raises(UserError, match=part) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_class_that_contradicts_tokenizer_json_is_refused(tmp_path: Path) -> None:
    """Versions of transformers read such a folder differently."""
    saved(trained(digits()), tmp_path, eos_token=ENDOFTEXT)
    edit(tmp_path / "tokenizer_config.json", lambda v: v.update(tokenizer_class="GPT2Tokenizer"))
    with pytest.raises(UserError, match="tokenizer_class GPT2Tokenizer"):
        load_tokenizer(tmp_path)


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    fast = trained()
    saved(fast, tmp_path, eos_token=ENDOFTEXT)
    two_files(fast, tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == fast.encode(TEXTS[0]).ids
    edit(tmp_path / "tokenizer.json", lambda v: v["model"]["merges"].pop())
    with pytest.raises(UserError, match="does not follow"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"merges\.txt is there, vocab\.json is missing"):
        load_tokenizer(tmp_path)


def test_eos_of_config_json_ends_texts_where_nothing_else_is_named(tmp_path: Path) -> None:
    saved(trained(special=("<s>", "</s>")), tmp_path)
    with pytest.raises(UserError, match="names no token that ends a text"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 1}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.endoftext == 1
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").endoftext == 1  # no config.json is needed from here on


def test_lone_surrogates_are_refused_in_one_line(folder: tuple[Path, str]) -> None:
    tokenizer = load_tokenizer(folder[0])
    for call in (
        lambda: tokenizer.encode("cut \ud83d emoji"),
        lambda: tokenizer.encode("cut \udc00", special=True),
        lambda: tokenizer.encode_batch(["whole", "cut \ud83d"], 2),
    ):
        with pytest.raises(UserError, match="lone surrogate U\\+D") as error:
            call()
        str(error.value).encode()  # the message itself can be printed
    assert tokenizer.encode("x\U0001f389")
