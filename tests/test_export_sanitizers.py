"""The native engine under the address, undefined-behaviour and thread sanitizers: a tour of it in C++.

    pytest tests/test_export_sanitizers.py -m slow

tests/engine_tour.cpp says what the tour sees. A driver in C++ rather than Python: every leak counts, and the
thread sanitizer knows every thread.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jaxgpt_export.native.library import instruction_sets

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "export" / "native"
SOURCES = [*sorted(NATIVE.glob("**/*.cpp")), ROOT / "tests" / "engine_tour.cpp"]
# As setup.py builds it, but -O1 with line numbers, and with bounds checked in the standard library too.
FLAGS = ("-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wno-psabi", "-pthread", "-D_GLIBCXX_ASSERTIONS")
LONGEST_S = 600  # to build and to run, on a busy machine; 20 s and 60 s on an idle one

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux"),
]


def tour(sanitizers: str, what: str, scratch: Path) -> subprocess.CompletedProcess[str]:
    program = scratch / "engine_tour"
    flags = (*FLAGS, f"-I{NATIVE}", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    build = ["g++", *flags, *map(str, SOURCES), "-o", str(program)]
    built = subprocess.run(build, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    if "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no library for -fsanitize={sanitizers}")
    assert built.returncode == 0, built.stderr
    options = {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [program, what],
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
        env={**os.environ, **options},
    )


@pytest.mark.parametrize(
    ("sanitizers", "what"),
    [("address,undefined", "all"), ("address,undefined", "threads"), ("thread", "threads")],
)
def test_a_tour_of_the_engine_leaves_the_sanitizers_silent(
    sanitizers: str, what: str, tmp_path: Path
) -> None:
    done = tour(sanitizers, what, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""
    for name in instruction_sets():
        assert name in done.stdout
