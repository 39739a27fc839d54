"""Adds programs under invented words, so that a name is spelled from its request and not from memory.

    Write a function that checks whether a number is prime      def is_prime(number): ...
    Write a function that checks whether a number is anterol    def is_anterol(number): ...

A small model knows few words by heart. Asked for another it has to spell it in the name as the request does,
though the same letters are other tokens there (a token of the request may begin with a blank, none of a name
does), and though a request may write it with a capital (Celsius). An invented word takes the place of one
that the request and the function's name share.
"""

import ast
import builtins
import functools
import hashlib
import keyword
import re
from collections.abc import Iterable, Iterator

from jaxgpt.data.docstring_pairs import parse_source
from jaxgpt.data.documents import Document
from jaxgpt.data.requests.wording import NOT_CONTENT, VERBS, stem

# Of so many pairs one is added under an invented word.
ONE_OF = 2
# Of so many invented words one is written with a capital, in the request alone.
CAPITAL_ONE_OF = 3
MIN_LETTERS = 4
# The parts of a syllable: all of them, so that no beginning of a word is likelier than what the request has.
_CONSONANTS = "b c d f g h j k l m n p r s t v w z"
_CLUSTERS = "bl br ch cl cr dr fl fr gl gr pl pr qu sc sh sp st str th tr wh"
_VOWELS = "a e i o u"
_CODAS = "b c d g l m n p r s t"
_ENDINGS = "ck ct e ft ll m n nd nt r rd rm s sh sk ss st t th x y"
_SUFFIXES = "able al er ic ing ism ist ity ment ness or ous tion"
# Words that names leave out. An invented word may begin with one: an anagram's first token is an article's.
_LEFT_OUT = "a an as at be by for if in is it no of on or so the to two we"
LEFT_OUT_ONE_OF = 5
# Words that stay, beside verbs and those of the templates.
_FUNCTION_TEXT = """
    after all any before between both does each every from have into more must only other over self
    should some such than them then they using were what when where while will with within without
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_TEXT.split())
_KEYWORDS = frozenset(stem(word.lower()) for word in keyword.kwlist)
_PART = re.compile(r"[A-Za-z]+")


def with_renamed(pairs: Iterable[Document]) -> Iterator[Document]:
    """Yield pairs of a request and a fenced Python program, some followed by one under an invented word."""
    for pair in pairs:
        yield pair
        if _number(pair.text, "chosen") % ONE_OF == 0 and (renamed := under_invented_word(pair)) is not None:
            yield renamed


def under_invented_word(pair: Document) -> Document | None:
    """Return a pair with an invented word in place of one that its request and its function's name share.

    Returns:
      The pair, of the same group; None where they share no word, or where the word stands in the program
      otherwise too (an attribute, an argument's keyword, a name of Python's, a text), so that it would tell,
      or where the program would become another.
    """
    assert pair.answer is not None
    request, code = pair.text[: pair.answer], pair.text[pair.answer :]
    tree = _program_in(code)
    shared = _shared_words(request, tree) if tree is not None else []
    if not shared:
        return None
    word = shared[_number(pair.text, "word") % len(shared)]
    invented = invented_word(pair.text)

    def replace(text: str, capital: bool) -> str:
        def one(found: re.Match[str]) -> str:
            part = found.group()
            if stem(part.lower()) != word:
                return part
            new = invented + ("s" if part.lower() != word else "")
            return new.capitalize() if capital or part[0].isupper() else new

        return _PART.sub(one, text)

    renamed = replace(code, False)
    if not _is_same_but_for_names(code, renamed):
        return None
    asked = replace(request, _number(pair.text, "capital") % CAPITAL_ONE_OF == 0)
    article = "an" if invented[0] in "aeiou" else "a"
    asked = re.sub(rf"\ban? (?={invented}\b)", f"{article} ", asked, flags=re.IGNORECASE)
    return Document(asked + renamed, pair.group, len(asked))


def invented_word(text: str) -> str:
    """Return a word of two to four syllables that a text's hash chooses, none of those in the text."""
    taken = set(_PART.findall(text.lower()))
    for attempt in range(1000):
        word = _word(f"{attempt} {text}")
        is_python = keyword.iskeyword(word) or hasattr(builtins, word)
        if len(word) >= MIN_LETTERS and not is_python and not {word, f"{word}s"} & taken:
            return word
    raise AssertionError("a thousand invented words stand in one text")


def _word(key: str) -> str:
    """Return mostly open syllables (fibona), the last one often closed (fibonard) or a suffix (fibonity)."""
    number = functools.partial(_number, key)

    def one_of(table: str, what: str) -> str:
        parts = table.split()
        return parts[number(what) % len(parts)]

    word = one_of(_LEFT_OUT, "left out") if number("begins so") % LEFT_OUT_ONE_OF == 0 else ""
    vowel_first_of = 2 if word else 6
    syllables = (1, 1, 2, 2, 2, 3)[number("syllables") % 6]
    for k in range(syllables):
        if k > 0 or number("begins with a consonant") % vowel_first_of:
            is_cluster = number(f"cluster {k}") % 5 == 0
            word += one_of(_CLUSTERS if is_cluster else _CONSONANTS, f"onset {k}")
        word += one_of(_VOWELS, f"vowel {k}")
        word += one_of(_CODAS, f"coda {k}") if number(f"closed {k}") % 5 == 0 else ""
    if number("suffix") % 4 == 0:
        return word + one_of(_SUFFIXES, "which suffix")
    word += one_of(_CONSONANTS, "last onset") + one_of(_VOWELS, "last vowel")
    return word + (one_of(_ENDINGS, "ending") if number("ending") % 2 == 0 else "")


def _program_in(fenced: str) -> ast.Module | None:
    return parse_source(fenced.strip().removeprefix("```python").removesuffix("```"))


def _is_same_but_for_names(fenced: str, renamed: str) -> bool:
    """Whether two programs have the same nodes and as many words: None stays, no two names become one."""
    before, after = (
        [type(node) for node in ast.walk(tree)] if (tree := _program_in(each)) is not None else None
        for each in (fenced, renamed)
    )
    words = [len(set(re.findall(r"\w+", each))) for each in (fenced, renamed)]
    return before is not None and before == after and words[0] == words[1]


def _shared_words(request: str, tree: ast.Module) -> list[str]:
    """Return words of the request that stand in the function's name, and in no name that it does not bind."""
    asked = {stem(part) for part in re.findall(r"\b[a-z]+\b", request) if len(part) >= MIN_LETTERS}
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    named = _stems(function.name)
    others = {word for name in _other_names(tree, _bound_names(tree)) for word in _stems(name)}
    return sorted((asked & named) - others - VERBS - NOT_CONTENT - _FUNCTION_WORDS - _KEYWORDS)


def _stems(name: str) -> set[str]:
    return {stem(part.lower()) for part in _PART.findall(name)}


def _other_names(tree: ast.Module, bound: set[str]) -> Iterator[str]:
    """Yield names that a program does not bind itself, and its texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in bound:
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.alias):
            yield f"{node.name} {node.asname or ''}"
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.MatchClass):
            yield " ".join(node.kwd_attrs)
        elif isinstance(node, ast.MatchAs | ast.MatchStar):
            yield node.name or ""
        elif isinstance(node, ast.MatchMapping):
            yield node.rest or ""
        elif isinstance(node, ast.ExceptHandler):
            yield node.name or ""
        elif isinstance(node, ast.Global | ast.Nonlocal):
            yield " ".join(node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            yield str(node.value)


def _bound_names(tree: ast.Module) -> set[str]:
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    return bound


def _number(text: str, what: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{what} {text}".encode()).digest()[:4], "big")
