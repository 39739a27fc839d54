"""What lies in docs/examples runs, on two simulated devices at a tiny size."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Command, rows
from transformers import GPT2Config, GPT2LMHeadModel

from jaxgpt.shared.dataset import open_dataset, windows
from jaxgpt.shared.tokenizer import load_tokenizer
from jaxgpt.training.run.folder import read_metrics

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
FLOAT32_LOSS_TOLERANCE = 1e-4
MAX_LINES = 50


def environment(**more: str) -> dict[str, str]:
    """Two simulated devices, this interpreter's commands first on PATH."""
    paths = (ROOT, ROOT / "export", ROOT / "bench")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        **more,
    }


def start(script: str, *arguments: object, **more: str) -> subprocess.Popen[str]:
    line = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.Popen(
        line, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out, err


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [(row["step"], name, row[name]) for row in read_metrics(run) for name in row if "loss" in name]


TRAIN = ("--steps", 6, "--save-every", 2)


@pytest.fixture(scope="module")
def script_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What train_data_parallel.py leaves, undisturbed."""
    out = tmp_path_factory.mktemp("script") / "run"
    _, err = finish(start("train_data_parallel.py", "--data", data, "--out", out, *TRAIN))
    assert "2 cpu device(s) as {'data': 2, 'fsdp': 1}" in err
    return out


def test_the_training_script_is_short() -> None:
    text = (EXAMPLES / "train_data_parallel.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES


def test_the_training_script_s_run_is_one_like_any_other(command: Command, script_run: Path) -> None:
    measured = [row["val_loss"] for row in read_metrics(script_run) if "val_loss" in row]
    assert measured[-1] < measured[0]
    code, out, err = command("jaxgpt", "evaluate", "--run", script_run, "--json")
    assert code == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert figures["step"] == 6
    assert figures["val_loss"] == pytest.approx(measured[-1], abs=FLOAT32_LOSS_TOLERANCE)
    assert command("jaxgpt", "sample", "--run", script_run, "--max-new-tokens", 5)[0] == 0
    code, _, err = command("jaxgpt-export", "verify", "--artifact", script_run / "fp32", "--run", script_run)
    assert code == 0, err


def test_the_training_script_resumes_bit_for_bit_after_a_kill(
    script_run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ("--data", data, "--out", out, *TRAIN)
    process = start("train_data_parallel.py", *arguments)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "2" / "_CHECKPOINT_METADATA").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "fp32").exists()
    _, err = finish(start("train_data_parallel.py", *arguments))
    assert "resuming after step" in err
    assert losses(out) == losses(script_run)
    weights = Path("fp32") / "model.safetensors"
    assert (out / weights).read_bytes() == (script_run / weights).read_bytes()


@pytest.fixture
def gpt2_folder(data: Path, tmp_path: Path) -> Path:
    """A random GPT-2 that transformers wrote, with the data set's tokenizer."""
    tokenizer = load_tokenizer(data)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def transformers_loss(folder: Path, data: Path, block_size: int) -> float:
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    inputs, targets = windows(open_dataset(data).val, block_size)
    with torch.inference_mode():
        logits = model(torch.from_numpy(inputs).long()).logits
    flat = torch.from_numpy(targets).long().flatten()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-1))


def test_fine_tuning_an_imported_gpt2_tells_the_losses_that_transformers_measures(
    gpt2_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(row["text"] for row in rows(300)), encoding="utf-8")
    arguments = ("--model", gpt2_folder, "--text", text, "--out", tmp_path / "out")
    settings = ("--steps", 12, "--block-size", 48, "--prompt", "Write a function")
    out, _ = finish(start("finetune.py", *arguments, *settings))
    (line,) = [line for line in out.splitlines() if line.startswith("validation loss: ")]
    before, after = float(line.split()[2]), float(line.split()[4])
    data = tmp_path / "out" / "data"
    assert before == pytest.approx(transformers_loss(gpt2_folder, data, 48), abs=FLOAT32_LOSS_TOLERANCE)
    found = transformers_loss(tmp_path / "out" / "fp32", data, 48)
    assert after == pytest.approx(found, abs=FLOAT32_LOSS_TOLERANCE)
    assert after < before
    for name in ("base", "fp32", "int8"):
        sample = out.partition(f"--- {name}, ")[2].partition("\n---")[0]
        assert sample.splitlines()[1].startswith("Write a function")
        assert len(sample.partition("Write a function")[2]) >= 20
