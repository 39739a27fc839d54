"""Damaged artifacts give one clear line: never a traceback, a crash, a hang, or gigabytes of memory.

    pytest tests/test_export_fuzz.py            300 damaged copies
    pytest tests/test_export_fuzz.py -m slow    10,000

Each copy is opened as `jaxgpt-export generate` opens it, up to a first greedy token. Its number is the seed
of its damage: FUZZ_FIRST=1234 FUZZ_COUNT=1 repeats one.
"""

import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxgpt_export.format.artifact import read_certified_artifact
from jaxgpt_export.generation.open_session import open_session
from tiny_artifacts import KINDS, tiny_artifacts

from jaxgpt.generation.generate import generate
from jaxgpt.generation.sampling import Sampling
from jaxgpt.shared.errors import UserError

LONGEST_S = 20  # of one damaged copy, on a busy machine; a whole one takes 0.02 s
MOST_MEMORY = 2**30  # that all copies together may add at their peak
LONGEST_MESSAGE = 5000
CERTIFICATE = "certificate.json"

FOLDER, NOWHERE, ITSELF = "folder", "link to nowhere", "link to itself"  # in place of a file's content
Files = dict[str, bytes | str]
Draw = random.Random


def deep(depth: int) -> str:
    """Stand for lists in lists, which the standard library's encoder would not write; see `encoded`."""
    return f"<{depth} deep>"


JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 8.0, 4, 16, 32, 127, 255, 4096, 65536, 65537, 2**20, 2**20 + 1,
    2**31 - 1, 2**31, -(2**31), 2**32 + 2, 2**63, 2**64, 10**30, 10**400, 10**4290, -(10**400), 0.5, -0.0,
    1e-300, 1e308, float("nan"), float("inf"), float("-inf"), "", "8", "wte", "a\nb", "\x00", "\ud800",
    "x" * 100_000, [], {}, [[]], [1, 2], ["wte"], ["wte", "wte"], [None], [[["wte"]]], list(range(1000)),
    {"a": {"b": [{}]}}, {"": 0}, deep(50), deep(900), deep(5000), "rotary", "learned", "static", "dynamic",
    "float", "gpt2", "jaxgpt_gpt2",
]  # fmt: skip
DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "F8_E4M3",
    "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "X", "",
)  # fmt: skip
HALVES = (0, 1, 0x7F, 0x7F7F, 0x7F80, 0x7FC0, 0x8000)  # of bfloat16 among others: large, infinite, NaN, -0
FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e-45, 1e30, 3e38, -3e38, 1e-38)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from places(child)


def junk(draw: Draw) -> Any:
    return copy.deepcopy(draw.choice(JUNK))  # it may be damaged in turn


def damage_json(value: Any, draw: Draw) -> Any:
    """Replace, remove, rename or add values; now and then the whole."""
    if draw.random() < 0.03:
        return junk(draw)
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        found = list(places(value))
        if not found:
            break
        top = [place for place in found if place[0] is value]
        where, key = draw.choice(draw.choice((found, top)))
        what = draw.randrange(8)
        if what == 0:
            del where[key]
        elif what == 1 and isinstance(where, dict):
            where[draw.choice(("surprise", "", "h.0.x", "a\nb", str(key) + "2"))] = where.pop(key)
        elif what == 2 and isinstance(where, dict):
            where["surprise"] = junk(draw)
        elif what == 3 and type(where[key]) is int:
            where[key] += draw.choice((-1, 1, 2**16, 2**31, -(2**31), 2**40))
        elif what == 4:
            other = draw.choice(found)
            where[key] = copy.deepcopy(other[0].get(other[1]) if isinstance(other[0], dict) else None)
        else:
            where[key] = junk(draw)
    return value


def encoded(value: Any) -> bytes:
    text = json.dumps(value)
    return re.sub(r'"<(\d+) deep>"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), text).encode()


def cut(content: bytes, draw: Draw) -> bytes:
    first = draw.randrange(len(content) + 1)
    last = draw.choice((len(content), draw.randrange(first, len(content) + 1)))
    return content[:first] + content[last:]


def flip(content: bytes, draw: Draw) -> bytes:
    changed = bytearray(content)
    near = draw.choice((len(changed), min(len(changed), 2000)))  # headers are short
    for _ in range(draw.choice((1, 1, 2, 8, 100))):
        if near:
            changed[draw.randrange(near)] = draw.randrange(256)
    return bytes(changed)


def grow(content: bytes, draw: Draw) -> bytes:
    at = draw.choice((0, len(content), draw.randrange(len(content) + 1)))
    return content[:at] + draw.randbytes(draw.choice((1, 8, 1000))) + content[at:]


def damage_values(content: bytes, draw: Draw) -> bytes:
    """Put a value that no artifact has into a tensor."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = draw.choice([name for name in header if name != "__metadata__"])
    first, last = (8 + length + offset for offset in header[name]["data_offsets"])
    changed = bytearray(content)
    kind = header[name]["dtype"]
    code = {"F32": "<f", "I8": "b", "U8": "B", "I32": "<i"}.get(kind, "<H")
    value: Any = draw.choice(FLOATS) if kind == "F32" else draw.choice(HALVES)
    if kind in ("I8", "U8"):
        value = draw.choice((-128, -127, 127)) if kind == "I8" else draw.randrange(256)
    one = struct.pack(code, value)
    count = (last - first) // len(one)
    chosen = range(count) if draw.random() < 0.5 else [draw.randrange(count)]
    for index in chosen:
        changed[first + index * len(one) : first + (index + 1) * len(one)] = one
    return bytes(changed)


def damage_header(content: bytes, draw: Draw) -> bytes:
    """Rename, drop, resize, retype tensors, or lie about the header's length."""
    length = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    what = draw.randrange(9)
    if what == 0:
        lie = draw.choice((0, 1, length - 1, length + 1, len(content), 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", lie) + content[8:]
    if what == 1:
        header[draw.choice(("surprise", "a\nb", "", "x" * 10_000, name + "2"))] = header.pop(name)
    elif what == 2:
        del header[name]
    elif what == 3:
        shape = header[name]["shape"]
        near = (shape[::-1], [1, *shape], [*shape, 1], shape[:1])
        odd = ([], [0], [-1], [2**40], [2**63], [2.5], "x", None, *near)
        header[name]["shape"] = draw.choice(odd)
    elif what == 4:
        header[name]["dtype"] = draw.choice(DTYPES)
    elif what == 5:
        ends = (0, 1, 4, 2**31, 2**63, -1, len(rest), len(rest) + 1)
        header[name]["data_offsets"] = [draw.choice(ends), draw.choice(ends)]
    elif what == 6:
        other = draw.choice(names)
        header[name], header[other] = header[other], header[name]
    elif what == 7:  # a file of its own making: fewer values, all in order
        first, last = header[name]["data_offsets"]
        gone = last - first
        header[name]["shape"], header[name]["data_offsets"] = [0], [first, first]
        for entry in (header[each] for each in names if each != name):
            entry["data_offsets"] = [at - gone if at >= last else at for at in entry["data_offsets"]]
        rest = rest[:first] + rest[last:]
    else:
        header = damage_json(header, draw)
    text = encoded(header)
    return struct.pack("<Q", len(text)) + text + rest


def damage_lines(content: bytes, draw: Draw) -> bytes:
    lines = content.split(b"\n")
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[at] = draw.choice((lines[other], b"", b"a", b"a b c", b"a b", b"\xff\xfe \xff", b"#version", b" "))
    return b"\n".join(lines)


def damage(files: dict[str, Files], kind: str, draw: Draw) -> tuple[Files, str]:
    """Return the files of an artifact with one to three of them damaged, and which."""
    made = dict(files[kind])
    with_certificate = draw.random() < 0.35
    if not with_certificate:
        del made[CERTIFICATE]
    whole = dict(made)
    said: list[str] = []
    while made == whole:
        names = sorted(made)
        name = draw.choice((draw.choice(names), "config.json", "model.safetensors"))
        content = made[name]
        ways: list[Callable[[bytes, Draw], bytes]] = [cut, flip, grow, lambda content, draw: b""]
        if name.endswith(".json"):
            ways += [lambda content, draw: encoded(damage_json(json.loads(content), draw))] * 12
        if name.endswith(".safetensors"):
            ways += [damage_header] * 6 + [damage_values] * 4
        if name.endswith(".txt"):
            ways += [damage_lines] * 6
        what = draw.random()
        if what < 0.03:
            made[name] = draw.choice((FOLDER, NOWHERE, ITSELF))
        elif what < 0.04 and name != CERTIFICATE:
            del made[name]
        elif what < 0.08:
            other = draw.choice(KINDS)
            made[name] = files[other].get(name, b"")
        elif what < 0.09:
            other_name = draw.choice(names)
            made[name], made[other_name] = made[other_name], made[name]
        else:
            assert isinstance(content, bytes)
            made[name] = draw.choice(ways)(content, draw)
        said.append(name)
    return made, f"{kind}, {'with' if with_certificate else 'without'} certificate, {', '.join(said)}"


def write_files(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content == FOLDER:
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to(name if content == ITSELF else "nowhere")


def first_token(folder: Path, kind: str) -> int:
    """Open a folder as `jaxgpt-export generate` does; return the first greedy token."""
    artifact = read_certified_artifact(folder)
    tokenizer = artifact.tokenizer()
    session, _ = open_session(artifact, "auto", 1)
    done = generate(session, tokenizer, "Go: on", 2, Sampling(temperature=0.0))
    assert all(0 <= token < tokenizer.vocab_size for token in done.tokens)
    return done.tokens[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_artifacts(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"one damaged copy took more than {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fuzz(folders: dict[str, Path], scratch: Path, count: int) -> Counter[str]:
    """Open damaged copies; return how they ended."""
    files: dict[str, Files] = {
        kind: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        for kind, folder in folders.items()
    }
    whole = {kind: first_token(folder, kind) for kind, folder in folders.items()}
    first = int(os.environ.get("FUZZ_FIRST", "0"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends: Counter[str] = Counter()
    wrong = []
    for number in range(first, first + int(os.environ.get("FUZZ_COUNT", count))):
        draw = random.Random(number)
        kind = draw.choice(KINDS)
        damaged, said = damage(files, kind, draw)
        write_files(scratch / "damaged", damaged)
        changed = {name for name in {*damaged, *files[kind]} if damaged.get(name) != files[kind].get(name)}
        signal.alarm(LONGEST_S)
        try:
            token = first_token(scratch / "damaged", kind)
        except UserError as error:
            ends["refused"] += 1
            if len(str(error)) > LONGEST_MESSAGE or len(str(error).splitlines()) != 1:
                wrong.append(f"{number} ({said}): the message is not one line: {str(error)[:200]!r}")
        except BaseException as error:
            wrong.append(f"{number} ({said}): {type(error).__name__}: {str(error)[:200]!r}")
        else:
            ends["read"] += 1
            if CERTIFICATE in damaged and (changed != {CERTIFICATE} or token != whole[kind]):
                wrong.append(f"{number} ({said}): {sorted(changed)} changed, nothing was said")
        finally:
            signal.alarm(0)
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:40])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert grown < MOST_MEMORY, f"damaged copies took {grown / 1e9:.1f} GB"
    return ends


def test_a_damaged_artifact_gives_one_clear_line(folders: dict[str, Path], tmp_path: Path) -> None:
    ends = fuzz(folders, tmp_path, 300)
    assert ends["refused"] > ends["read"]


@pytest.mark.slow
def test_ten_thousand_damaged_artifacts_give_one_clear_line_each(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    started = time.perf_counter()
    ends = fuzz(folders, tmp_path, 10_000)
    print(f"\n{dict(ends)} in {time.perf_counter() - started:.0f} s")  # noqa: T201
    assert ends["refused"] > ends["read"]
