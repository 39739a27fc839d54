"""Fixtures: a small real pipeline, run once a session through the command line, and shared."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "0"
os.environ.pop("JAXGPT_API_KEY", None)  # these three are of the person who runs the tests
os.environ.pop("JAXGPT_ISA", None)
os.environ.pop("JAXGPT_ENGINE", None)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: PyTorch's threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:  # what is compiled once serves all workers and the commands that tests start
    COMPILED = tempfile.mkdtemp(prefix="jaxgpt-tests-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    os.environ["JAXGPT_CACHE"] = os.path.join(COMPILED, "cache")  # what was checked is no user's
    # Hundreds of programs are compiled and run for a moment each: LLVM's passes would take most of the time.
    # What XLA decides (fusion, layout, collectives) stays.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
assert jax.device_count() == 8  # starts JAX before a command may ask for fewer devices


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's commands first: they take longest, and nothing should wait for them at the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def pytest_unconfigure() -> None:
    """Remove what was compiled."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(COMPILED, ignore_errors=True)


NAMES = ("total", "count", "width", "height", "index", "value", "price", "score", "level", "depth")
VERBS = ("add", "multiply", "subtract", "compare", "count", "merge", "scale", "clamp")


def rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of the schema of python-codes-25k: small functions, each different."""
    draw = random.Random(seed)
    made = []
    for i in range(number):
        verb, a, b = draw.choice(VERBS), draw.choice(NAMES), draw.choice(NAMES)
        operators = [draw.choice("+-*") for _ in range(draw.randint(2, 6))]
        body = "\n".join(f"    {a} = {a} {op} {draw.randint(0, 999)} * {b}_{i}" for op in operators)
        code = f"```python\ndef {verb}_{a}_{i}({a}, {b}_{i}):\n{body}\n    return {a}\n```"
        instruction = f"Write a function to {verb} the {a} by the {b}, case {i}"
        made.append(
            {
                "instruction": instruction,
                "input": f"{verb}_{a}_{i}",
                "output": code,
                "text": f"{instruction} {verb}_{a}_{i} {code}",
            }
        )
    return made


def write_jsonl(path: Path, content: list[dict[str, str]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a console command in this process: (exit code, stdout, stderr)."""

    def call(program: str, *arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_command(program, *arguments)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def run_command(program: str, *arguments: object) -> int:
    """Run a console command in this process; return its exit code."""
    import jaxgpt_bench.cli
    import jaxgpt_export.cli

    import jaxgpt.cli

    mains = {
        "jaxgpt": jaxgpt.cli.main,
        "jaxgpt-export": jaxgpt_export.cli.main,
        "jaxgpt-bench": jaxgpt_bench.cli.main,
    }
    return mains[program]([str(argument) for argument in arguments])


def assert_one_line_error(result: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2 and exactly one line on stderr that holds the parts; nothing on stdout."""
    code, out, err = result
    lines = err.strip().splitlines()
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


@pytest.fixture
def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let JAX lower for a GPU that is not there: its checks of cuDNN and device are replaced."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    answers = {
        "check_cudnn_version": 91000,
        "check_compute_capability": None,
        "is_cuda_compute_capability_equal": False,
    }
    for name, answer in answers.items():
        if not hasattr(fused, name):
            pytest.skip(f"this JAX has no {name}, which the test would replace")
        monkeypatch.setattr(fused, name, lambda *_, answer=answer: answer)


TINY_SHAPE = ("--n-layer", 2, "--n-head", 2, "--n-embd", 32, "--block-size", 64)
TINY_TRAIN = (
    "--batch-size", 8, "--max-steps", 40, "--learning-rate", 0.01, "--embedding-learning-rate", 0.005,
    "--eval-every", 20, "--checkpoint-every", 20, "--sample-every", 40, "--warmup-steps", 4,
)  # fmt: skip


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pipeline lies in, one for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pipeline"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(target: Path, make: Callable[[], int]) -> Path:
    """Make a part of the pipeline by a command, unless another worker has; wait for one that is about to.

    Args:
      target: the folder that the command writes.
      make: runs the command, returns its exit code.
    """
    from jaxgpt.shared.locks import wait_for_lock

    done = target.with_name(f"{target.name}.done")
    with wait_for_lock(target.with_name(f"{target.name}.lock"), waiting=lambda: None):
        if not done.exists():
            assert make() == 0
            done.touch()
    return target


@pytest.fixture(scope="session")
def data(work: Path) -> Path:
    """A prepared data set."""

    def make() -> int:
        source = write_jsonl(work / "rows.jsonl", rows(600))
        arguments = ("--source", source, "--tokenizer", "bpe:384", "--val-fraction", 0.1)
        return run_command("jaxgpt", "prepare", *arguments, "--out", work / "data")

    return made_once(work / "data", make)


def train_words(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    """The words of the command that trains the pipeline's run."""
    return (
        "train",
        "tiny",
        "--data",
        data,
        "--out",
        out,
        "--cpu-devices",
        2,
        *TINY_SHAPE,
        *TINY_TRAIN,
        *more,
    )


@pytest.fixture(scope="session")
def run(work: Path, data: Path) -> Path:
    """A finished training."""
    return made_once(work / "run", lambda: run_command("jaxgpt", *train_words(data, work / "run")))


@pytest.fixture(scope="session")
def run_alone(work: Path, data: Path) -> Path:
    """The same training in a process of its own, to compare bits with others of such processes.

    XLA takes a thread for each device, these tests simulate 8, and the order in which sums are formed depends
    on the number of threads.
    """
    words = [str(word) for word in train_words(data, work / "alone")]
    command, environment = python(f"import sys; from jaxgpt.cli import main; sys.exit(main({words!r}))")

    def make() -> int:
        return subprocess.run(command, env=environment, capture_output=True).returncode

    return made_once(work / "alone", make)


@pytest.fixture(scope="session")
def fp32(work: Path, run: Path) -> Path:
    """The float32 artifact of the run."""
    return _converted(run, work / "fp32")


def _converted(run: Path, out: Path) -> Path:
    return made_once(out, lambda: run_command("jaxgpt-export", "convert", "--run", run, "--out", out))


def _quantized(method: str, work: Path, fp32: Path, data: Path) -> Path:
    out = work / method
    arguments = ("--artifact", fp32, "--method", method, "--data", data, "--out", out)
    return made_once(out, lambda: run_command("jaxgpt-export", "quantize", *arguments))


@pytest.fixture(scope="session")
def int8_dynamic(work: Path, fp32: Path, data: Path) -> Path:
    """The INT8 artifact with dynamic inputs."""
    return _quantized("int8-dynamic", work, fp32, data)


@pytest.fixture(scope="session")
def int8_static(work: Path, fp32: Path, data: Path) -> Path:
    """The INT8 artifact with static inputs."""
    return _quantized("int8-static", work, fp32, data)


@pytest.fixture(scope="session")
def int8_weight_only(work: Path, fp32: Path, data: Path) -> Path:
    """The artifact with int8 weights and float inputs."""
    return _quantized("int8-weight-only", work, fp32, data)


@pytest.fixture(scope="session")
def int4(work: Path, fp32: Path, data: Path) -> Path:
    """The artifact with int4 weights, by GPTQ, and float inputs."""
    return _quantized("int4-weight-only", work, fp32, data)


@pytest.fixture(scope="session")
def qat_run(work: Path, run: Path, data: Path) -> Path:
    """The run, trained on with the rounding of a static artifact."""
    given = ("tiny", "--data", data, "--out", work / "qat", "--init", run, "--qat", *TINY_TRAIN)
    words = ("train", *given, "--max-steps", 10, "--learning-rate", 0.001)
    return made_once(work / "qat", lambda: run_command("jaxgpt", *words))


@pytest.fixture(scope="session")
def qat_fp32(work: Path, qat_run: Path) -> Path:
    """The float32 artifact of the quantization-aware training, with its input scales."""
    return _converted(qat_run, work / "qat-fp32")


@pytest.fixture(scope="session")
def int8_static_qat(work: Path, qat_fp32: Path, data: Path) -> Path:
    """The INT8 artifact with the input scales that were trained."""
    return _quantized("int8-static-qat", work, qat_fp32, data)


def python(code: str) -> tuple[list[str], dict[str, str]]:
    """Return the command line and environment of a fresh interpreter that runs code in the project."""
    root = Path(__file__).resolve().parent.parent
    paths = (root, root / "export", root / "bench")
    return [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


@pytest.fixture
def sandbox() -> None:
    """Skip the test where this system gives programs no sandbox."""
    from jaxgpt_bench.sandbox.sandbox import require_sandbox

    from jaxgpt.shared.errors import UserError

    try:
        require_sandbox()
    except UserError as error:
        pytest.skip(str(error))
