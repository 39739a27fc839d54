"""What lies in docs/examples runs, on two simulated devices at a tiny size."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, rows, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

from jaxgpt.shared.console import parse
from jaxgpt.shared.dataset import open_dataset, windows
from jaxgpt.shared.tokenizer import load_tokenizer
from jaxgpt.training.options import TrainOptions, run_config
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
    typo = start("finetune.py", "--model", tmp_path / "none", *arguments[2:], *settings)
    assert "error: " in typo.communicate(timeout=240)[1]  # and nothing is left that the right command minds
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


def test_fine_tuning_in_a_folder_that_was_made_of_something_else_is_one_line(
    gpt2_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "base").mkdir(parents=True)
    (out / "base" / "made-of.txt").write_text("another model")
    process = start("finetune.py", "--model", gpt2_folder, "--text", "b.txt", "--out", out)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"{out / 'base'} does not say that it was made of {gpt2_folder}" in line
    assert "choose another --out" in line
    assert "Traceback" not in err
    assert [path.name for path in out.iterdir()] == ["base"]


NOTEBOOK = json.loads((EXAMPLES / "two_t4.ipynb").read_text(encoding="utf-8"))


def cells(kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]


def tagged(tag: str) -> dict[str, Any]:
    (cell,) = [cell for cell in cells() if tag in cell["metadata"].get("tags", [])]
    return cell


def program(parameters: str) -> str:
    """The notebook as a program: other parameters, nothing installed, `!line` run by the shell."""
    lines = ["import subprocess"]
    for cell in cells():
        if cell["id"] == tagged("install")["id"]:
            continue
        source = parameters if cell["id"] == tagged("parameters")["id"] else "".join(cell["source"])
        for line in source.splitlines():
            shell = f"subprocess.run({line[1:]!r}.format(**globals()), shell=True, check=True)"
            lines.append(shell if line.startswith("!") else line)
    return "\n".join(lines)


def parameters_of(source: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(source, found)
    return {name: value for name, value in found.items() if name.isupper()}


def test_the_notebook_is_one_of_format_4_and_holds_no_output() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert set(NOTEBOOK) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    assert len(cells()) + len(cells("markdown")) == len(ids)
    common = {"cell_type", "id", "metadata", "source"}
    assert all(set(cell) == common for cell in cells("markdown"))
    assert all(set(cell) == {*common, "execution_count", "outputs"} for cell in cells())
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())


def test_the_notebook_s_own_training_is_float16_over_two_devices(data: Path) -> None:
    given = parameters_of("".join(tagged("parameters")["source"]))
    words = ("--data", str(data), "--out", "run", "--max-steps", str(given["STEPS"]), *given["TRAIN"].split())
    options = parse(TrainOptions, "jaxgpt train", [given["PRESET"], *words])
    config = run_config(options, open_dataset(data))
    assert (config.train.precision, options.devices.mesh) == ("fp16", "data=2")
    assert config.train.batch_size // config.train.grad_accum_steps % 2 == 0
    assert given["NEW_TOKENS"] == 250
    assert given["SOURCE"] == "hub:flytech/python-codes-25k"


def test_the_notebook_trains_quantizes_and_shows_both_models_side_by_side(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows(300))
    parameters = (
        "SOURCE = 'rows.jsonl'\nTOKENIZER = 'bpe:384'\nPRESET = 'tiny'\nSTEPS = 8\n"
        "TRAIN = '--mesh data=2 --precision fp16 --cpu-devices 2 --n-layer 2 --n-head 2 --n-embd 32 '\\\n"
        "    '--block-size 64 --batch-size 8 --grad-accum-steps 2 --eval-every 4 --checkpoint-every 4'\n"
        "PROMPTS = ['Write a function', 'Count the']\nNEW_TOKENS = 40\nREPOSITORY = ''\n"
    )
    own = "".join(tagged("parameters")["source"])
    assert parameters_of(parameters).keys() == parameters_of(own).keys()
    line = [sys.executable, "-c", program(parameters)]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 cpu device(s) as {'data': 2, 'fsdp': 1}" in done.stderr
    trained = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 9))
    assert all(row["loss_scale"] > 1 for row in trained)
    table = re.findall(r"^(float32|INT8) +([0-9.]+) +([0-9.]+) +([0-9.]+)$", done.stdout, flags=re.MULTILINE)
    assert [name for name, *_ in table] == ["float32", "INT8"]
    (loss, size, rate), (loss8, size8, rate8) = (tuple(map(float, figures)) for _, *figures in table)
    assert loss == pytest.approx(transformers_loss(tmp_path / "fp32", tmp_path / "data", 64), abs=1e-3)
    assert abs(loss8 - loss) < 0.01
    assert size8 < size / 2
    assert min(rate, rate8) > 0
    for prompt in ("Write a function", "Count the"):
        heading, _, below = done.stdout.partition(f"=== {prompt}\n")[2].partition("\n")
        assert re.fullmatch("float32 +[|] INT8", heading)
        assert " | " in below.splitlines()[0]


def free_job_id() -> int:
    """An Open MPI job id of which JAX derives a port that is free: 61440 + (id / 4096) mod 4096."""
    for number in range(os.getpid() % 4096, os.getpid() % 4096 + 4096):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", 61440 + number % 4096))
            return number % 4096 * 4096
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_the_training_script_in_two_processes_trains_what_it_trains_in_one(
    command: Command, script_run: Path, data: Path, tmp_path: Path
) -> None:
    """As mpirun starts them, a device each; the conversion is left to a command afterwards."""
    out, uri = tmp_path / "run", f"{free_job_id()}.0;tcp://127.0.0.1:1"
    arguments = ("--data", data, "--out", out, *TRAIN, "--distributed")
    processes = [
        start(
            "train_data_parallel.py",
            *arguments,
            JAX_NUM_CPU_DEVICES="1",
            OMPI_MCA_orte_hnp_uri=uri,
            OMPI_COMM_WORLD_SIZE="2",
            OMPI_COMM_WORLD_RANK=str(index),
            OMPI_COMM_WORLD_LOCAL_RANK=str(index),
        )
        for index in range(2)
    ]
    assert "2 cpu device(s) as {'data': 2, 'fsdp': 1}" in finish(processes[0])[1]
    finish(processes[1])
    found, expected = losses(out), losses(script_run)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    differences = [abs(a - b) for (*_, a), (*_, b) in zip(found, expected, strict=True)]
    assert max(differences) <= FLOAT32_LOSS_TOLERANCE
    assert not (out / "fp32").exists()
    assert command("jaxgpt-export", "convert", "--run", out, "--out", tmp_path / "fp32")[0] == 0
