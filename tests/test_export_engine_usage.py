"""The native engine as it is used: by `generate`, by a variable, by files of prompts; and what it needs."""

import json
import subprocess
from pathlib import Path

import jaxgpt_export.native.library
import pytest
from conftest import Command, assert_one_line_error, python
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.native.bandwidth import read_bandwidth
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.native.native_model import NativeModel

from jaxgpt.shared.machine import cpu_quota, usable_cores

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")


def test_the_variable_chooses_the_instruction_set(int8_static: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXGPT_ISA", "portable")
    assert NativeModel(read_artifact(int8_static), 1).isa == "portable"


def test_cores_follow_the_control_group(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) == float("inf")
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cpu_quota(tmp_path) == 2.0
    assert usable_cores() >= 1


def test_bandwidth_is_that_of_a_machine() -> None:
    assert 0.5 < read_bandwidth(10_000_000, 1) < 10_000


def test_generate_takes_the_engine_and_says_which(command: Command, int8_dynamic: Path) -> None:
    arguments = ("generate", "--artifact", int8_dynamic, "--max-new-tokens", 8, "--temperature", 0, "--json")
    code, out, _ = command("jaxgpt-export", *arguments)
    native = json.loads(out)
    assert code == 0
    assert native["engine"].startswith("jaxgpt-native (")
    code, out, _ = command("jaxgpt-export", *arguments, "--engine", "torch")
    assert json.loads(out)["engine"] == "jaxgpt-torch"
    assert json.loads(out)["tokens"] == native["tokens"]


def test_without_a_build_the_module_runs_and_says_so(
    command: Command, int8_dynamic: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAXGPT_ENGINE", str(tmp_path / "none.so"))
    jaxgpt_export.native.library.engine_library.cache_clear()
    try:
        arguments = ("generate", "--artifact", int8_dynamic, "--max-new-tokens", 2)
        code, _, err = command("jaxgpt-export", *arguments)
        assert code == 0
        assert "the PyTorch module runs, which is slower" in err
        assert "no C++17 compiler" in err
        result = command("jaxgpt-export", *arguments, "--engine", "native")
        assert_one_line_error(result, "native engine cannot run it", "no C++17 compiler")
    finally:
        monkeypatch.undo()
        jaxgpt_export.native.library.engine_library.cache_clear()


def test_prompts_of_a_file_come_back_in_order(command: Command, int8_dynamic: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    wanted = [
        {"prompt": "Write a function", "seed": 5},
        {"prompt": "", "max_new_tokens": 3},
        {"prompt": "def"},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in wanted) + "\n")
    common = ("generate", "--artifact", int8_dynamic, "--max-new-tokens", 12)
    code, out, _ = command("jaxgpt-export", *common, "--prompts", prompts, "--batch", 2)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["prompt"] for line in lines] == [line["prompt"] for line in wanted]
    assert len(lines[1]["tokens"]) <= 3
    alone = command("jaxgpt-export", *common, "--prompt", "Write a function", "--seed", 5, "--json")
    assert json.loads(alone[1])["tokens"] == lines[0]["tokens"]
    prompts.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    result = command("jaxgpt-export", *common, "--prompts", prompts)
    assert_one_line_error(result, "line 2 has prompt 3", "prompt (str)")
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b", "seed": -1}\n')
    result = command("jaxgpt-export", *common, "--prompts", prompts)
    assert_one_line_error(result, "line 2 has seed -1, expected at least 0")
    prompts.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "word " * 500}) + "\n")
    result = command("jaxgpt-export", *common, "--prompts", prompts)
    assert_one_line_error(result, "prompt 2 of 2: the prompt has", "shorten the prompt")
    assert result[1] == ""


@pytest.mark.parametrize("what", ["generate", "gguf", "program"])
def test_an_altered_file_is_refused_before_anything_runs(
    command: Command, fp32: Path, tmp_path: Path, what: str
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in fp32.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    out = {"gguf": tmp_path / "out.gguf", "program": tmp_path / "out.pt2"}.get(what)
    more = ("--max-new-tokens", 2) if out is None else ("--out", out)
    result = command("jaxgpt-export", what, "--artifact", copy, *more)
    assert_one_line_error(result, "model.safetensors changed since certificate.json was written")
    assert out is None or not out.exists()


FORKED = """
import gc, os, signal
from jaxgpt_export.llm import LLM
first = LLM.load({artifact!r}, threads=2)
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    second = LLM.load({artifact!r}, threads=2)
    del first
    gc.collect()
    print(second.generate("a", max_new_tokens=2, temperature=0) is not None, flush=True)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(usable_cores() < 2, reason="one core: no threads beside the caller")
def test_a_forked_process_lets_an_inherited_model_go(int8_dynamic: Path) -> None:
    """It has none of the threads that the model's freeing would wait for."""
    line, environment = python(FORKED.format(artifact=str(int8_dynamic)))
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


FORKED_AMID_STEPS = """
import os, signal, threading
from jaxgpt_export.llm import LLM
llm = LLM.load({artifact!r}, threads=2)
text = llm.generate("a", max_new_tokens=20, temperature=0)
done = threading.Event()
def work():
    while not done.is_set():
        llm.generate("a", max_new_tokens=20, temperature=0)
thread = threading.Thread(target=work)
thread.start()
codes = set()
for _ in range(10):
    if codes - {{0}}:
        break
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(llm.generate("a", max_new_tokens=20, temperature=0) != text)
    codes.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
done.set()
thread.join()
print(codes, llm.generate("a", max_new_tokens=20, temperature=0) == text)
"""


@pytest.mark.skipif(usable_cores() < 2, reason="one core: no threads beside the caller")
def test_a_process_forked_while_a_thread_generates_uses_the_inherited_model(int8_dynamic: Path) -> None:
    line, environment = python(FORKED_AMID_STEPS.format(artifact=str(int8_dynamic)))
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "{0} True\n", done.stderr


FORKED_WITH_MODULE = """
import os, signal
from jaxgpt_export.llm import LLM
llm = LLM.load({artifact!r}, engine="torch", threads=2)
prompt = "a" * 40
text = llm.generate(prompt, max_new_tokens=5, temperature=0)
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    os._exit(llm.generate(prompt, max_new_tokens=5, temperature=0) != text)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(usable_cores() < 2, reason="one core: no threads beside the caller")
def test_a_forked_process_generates_with_the_module_that_it_inherits(int8_dynamic: Path) -> None:
    """PyTorch's threads are not in it."""
    line, environment = python(FORKED_WITH_MODULE.format(artifact=str(int8_dynamic)))
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "0\n", done.stderr


def test_packing_leaves_edited_tensors_as_they_are(int8_dynamic: Path) -> None:
    """Mapped memory that was written and is given back has the file's content again."""
    artifact = read_artifact(int8_dynamic)
    artifact.tensors["h.0.ln_1.bias"][:] = 2.0
    artifact.tensors["wte.weight"][:] = 1
    NativeModel(artifact, 1)
    assert (artifact.tensors["wte.weight"] == 1).all()
    assert (artifact.tensors["h.0.ln_1.bias"] == 2.0).all()
