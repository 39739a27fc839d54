"""`jaxgpt-bench prepare`: its text, what it measures, and that nanoGPT's way gives nanoGPT's tokens."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.prepare import command as bench
from jaxgpt_bench.prepare import nanogpt_way, source
from jaxgpt_bench.prepare.measured import Measured, measured

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import gpt2_tokenizer


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ten installed Python files; their texts."""
    folder = tmp_path / "installed"
    folder.mkdir()
    texts = [f"def function_{i}(value):\n    return value\n" * 20 for i in range(10)]
    for i, text in enumerate(texts):
        (folder / f"{i}.py").write_text(text)
    (folder / "short.py").write_text("x = 1\n")
    monkeypatch.setattr(source, "installed_folders", lambda: [folder])
    return texts


def test_text_comes_again_in_other_words_until_there_is_enough(tmp_path: Path, installed: list[str]) -> None:
    count = source.write_source(tmp_path / "a.jsonl", 25_000)
    found = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert found[:10] == installed
    assert len(found) == len(set(found)) == count > 20
    assert "return1" in found[10]


def test_time_and_memory_are_of_a_command_and_its_children() -> None:
    child = "import time; x = bytearray(60_000_000); time.sleep(0.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); sum(range(10**7))"
    found = measured([sys.executable, "-c", code], {})
    assert found.seconds > 0.5
    assert 0.05 < found.cpu_seconds < 10 * found.seconds
    assert 60_000_000 < found.peak_memory_bytes < 200_000_000
    with pytest.raises(UserError, match="code 3: no reason"):
        measured([sys.executable, "-c", "import sys; print('no reason', file=sys.stderr); sys.exit(3)"], {})


def test_nanogpts_way_gives_the_tokens_of_gpt2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str]
) -> None:
    monkeypatch.setattr(nanogpt_way, "VAL_SHARE", 0.2)
    nanogpt_way.fill_cache(tmp_path / "tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    source.write_source(tmp_path / "a.jsonl", 5_000)
    nanogpt_way.prepare(tmp_path / "a.jsonl", tmp_path, 1)
    tokenizer = gpt2_tokenizer()
    found = []
    for name in ("train", "val"):
        tokens = np.fromfile(tmp_path / f"{name}.bin", np.uint16)
        ends = np.flatnonzero(tokens == tokenizer.endoftext)
        found += [
            tokenizer.decode(part[part != tokenizer.endoftext].tolist()) for part in np.split(tokens, ends)
        ]
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert sorted(filter(None, found)) == sorted(texts)


def test_figures_are_those_that_were_measured(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str]
) -> None:
    def fake(line: list[str], environment: dict[str, str]) -> Measured:
        out = Path(line[line.index("--out") + 1]) if "--out" in line else Path(line[4])
        out.mkdir(exist_ok=True)
        assert os.path.exists(line[line.index("--source") + 1] if "--source" in line else line[3])
        return Measured(2.0, 3.0, 400_000_000)

    monkeypatch.setattr(bench, "measured", fake)
    given = ("jaxgpt-bench", "prepare", "--sizes", 1, "--workers", 2, "--out", tmp_path / "a.json", "--json")
    work = tmp_path / "not" / "there"
    code, printed, err = command(*given, "--work", work)
    assert code == 0, err
    assert list(work.iterdir()) == []  # made, and left empty
    figures = json.loads(printed)
    assert figures == json.loads((tmp_path / "a.json").read_text())
    assert figures["noise"]["others_cpu_share"] >= 0
    assert [row["way"] for row in figures["rows"]] == ["jaxgpt", "nanogpt"]
    for row in figures["rows"]:
        assert row["mb_per_s"] == row["source_bytes"] / 2e6
        assert (row["cores_busy"], row["peak_memory_mb"]) == (0.75, 400)
    made = bench.PrepareFigures.from_json(figures)
    assert "400 MB for 0.0 GB, 400 MB for 0.0 GB" in bench.markdown_block(made, made)
    assert_one_line_error(command(*given[:3], 0, *given[4:]), "--sizes")
