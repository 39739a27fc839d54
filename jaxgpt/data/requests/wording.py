"""The words of requests: what a docstring's sentence or a function's name asks for; when two ask alike."""

import re
from collections.abc import Sequence

# Verbs that docstrings and names of functions begin with.
_VERBS = """
    add adjust align allocate analyze append apply approximate assemble assert assign attach build calculate
    call cast change check choose clean clear clip close collapse collect combine compare compile complete
    compose compress compute concatenate configure construct contract convert copy count create cut decode
    decompose decompress decrypt deduce delete derive describe detect determine differentiate display
    distribute divide download drop dump emit encode encrypt ensure enumerate escape estimate evaluate
    examine exchange execute expand extend extract factor fetch fill filter find fit fix flatten flip format
    generate get give group guess handle hash identify implement import increment infer initialize insert
    inspect integrate interpolate interpret intersect invert iterate join keep list load locate look make map
    match measure merge minimize modify move multiply negate normalize obtain open order pad parse partition
    patch perform permute pick plot pop prepare prepend print process produce project prune push put query
    quote raise randomize read reduce refine register remove rename render reorder repeat replace report
    reset reshape resolve retrieve return reverse rotate round run sample save scale scan search select send
    separate serialize set shift show shuffle simplify skip slice solve sort split square start stop store
    strip subtract sum swap take tell test tokenize transform translate transpose traverse trim truncate try
    turn unescape unpack update validate verify visit walk wrap write yield zip
"""
VERBS = frozenset(_VERBS.split())
# Verbs that say the same before a noun: docstrings return what people ask to compute.
GIVING = ("compute", "calculate", "find", "return", "get", "compute")
GIVEN = frozenset({"return", "compute", "calculate", "get", "give", "find", "obtain", "retrieve"})
TESTING = ("check if", "check whether", "determine if", "tell if")
TESTED = r"(?:True|true|Truthy|1) (?:if|when|iff|whether|if and only if)\b|(?:whether|if)\b"
MIN_WORDS, MAX_WORDS = 2, 22
_TEMPLATE_WORDS = """
    a an the of to for in it its is are be this that which and python function program write create code
    script method given whether if true false check checks determine determines tell tells compute computes
    calculate calculates find finds return returns get gets give gives test tests
"""
NOT_CONTENT = frozenset(_TEMPLATE_WORDS.split())

Task = tuple[str, str]


def third_person(phrase: str) -> str:
    """Return a phrase with its first word, a verb, in the third person."""
    verb, space, rest = phrase.partition(" ")
    if re.search(r"(s|sh|ch|x|z|o)$", verb):
        verb += "es"
    elif re.search(r"[^aeiou]y$", verb):
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return verb + space + rest


def base_verb(word: str) -> str | None:
    """Return the base form of a word that is one of the verbs; None for another."""
    word = word.lower()
    forms = (word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word))
    return next((form for form in forms if form in VERBS), None)


def tasks_of_sentence(sentence: str) -> list[Task]:
    """Return what a docstring's first sentence asks for, in several wordings; none if it does not say."""
    sentence = re.sub(r":\w+:|[`*]|\s*\(.*?\)", "", sentence).strip().rstrip(".")
    words = sentence.split()
    if not MIN_WORDS < len(words) <= MAX_WORDS or re.search(r"[<>{}\\|=@#]|>>>|\.\.|self\b", sentence):
        return []
    verb, rest = base_verb(words[0]), " ".join(words[1:])
    if verb is None:
        return []
    if verb in (*GIVEN, "check", "test", "determine", "tell") and (tested := re.match(TESTED, rest)):
        rest = re.sub(
            r",? (?:and )?(?:else|otherwise|or) (?:returns? )?(?:False|false|None)\b.*$",
            "",
            rest[tested.end() :].strip(),
        )
        phrases = [f"{each} {rest}" for each in TESTING]
    elif verb in GIVEN and (counted := re.match(r"the (?:total )?number of (?=\w+s\b)", rest)):
        phrases = [f"count the {rest[counted.end() :]}", f"find {rest}", f"count {rest}"]
    elif verb in GIVEN:
        phrases = [f"{each} {rest}" for each in dict.fromkeys((*GIVING, verb))]
        turn = len(rest) % len(phrases)
        phrases = phrases[turn:] + phrases[:turn]
    else:
        phrases = [f"{verb} {rest}"]
    return [(phrase, third_person(phrase)) for phrase in phrases]


def request_of_name(name: str, arguments: Sequence[str]) -> list[Task]:
    """Return what a function's name asks for: `is_prime` to check whether a number is prime."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    words = [word for word in words if word]
    if not words or any(not word.isalpha() or len(word) < 2 for word in words) or len(words) > 5:
        return []
    rest = " ".join(words[1:])
    if words[0] in ("is", "has", "can") and rest:
        subject = next((each.replace("_", " ") for each in arguments if len(each) > 3), "value")
        subject = {"self": "value", "string": "string"}.get(subject, subject)
        phrases = [f"{each} {_article(subject)} {words[0]} {rest}" for each in TESTING[:2]]
    elif "to" in words[1:-1]:
        phrases = [f"convert {rest}" if words[0] == "convert" else f"convert {' '.join(words)}"]
    elif words[0] in VERBS and rest:
        phrases = [f"{words[0]} the {rest}", f"{words[0]} {_article(rest)}", f"{words[0]} {rest}"]
    elif words[0] in VERBS:
        subject = next((each.replace("_", " ") for each in arguments if len(each) > 3 and each.isalpha()), "")
        phrases = [f"{words[0]} {_article(subject)}", f"{words[0]} the {subject}"] if subject else []
    elif rest or len(words[0]) > 2:
        phrases = [f"{verb} the {' '.join(words)}" for verb in GIVING[:4]]
    else:
        phrases = []
    return [(phrase, third_person(phrase)) for phrase in phrases]


def _article(noun: str) -> str:
    if noun.endswith("s") and not noun.endswith("ss"):
        return noun
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"


def normalized_request(request: str) -> str:
    """Return a request's content words, sorted: requests that differ in the words around them are equal."""
    words = re.findall(r"[a-z0-9]+", request.lower())
    content = {stem(word) for word in words if word not in NOT_CONTENT}
    return " ".join(sorted(content))


def stem(word: str) -> str:
    """Return a word of lower case without the s of its plural."""
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word
