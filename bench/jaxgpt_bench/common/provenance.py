"""What machine, date, commit and command a figure comes from."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from jaxgpt_export.native.library import library_path

from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.machine import usable_cores
from jaxgpt_bench.common.formatting import without_folders
from jaxgpt_bench.common.rows import Machine, Noise, Provenance

# Of the source tree, where this package lies in one: ROOT/bench/jaxgpt_bench/common/provenance.py
ROOT = Path(__file__).resolve().parents[3]

CODE = ("jaxgpt/*.py", "export/*.py", "bench/*.py", "export/native/*")  # a star stands for slashes, too
PACKAGES = (
    *("jax", "flax", "torch", "transformers", "numpy"),
    *("onnxruntime", "openvino", "ctranslate2", "llama-cpp-python", "torchao", "executorch"),  # peers
)


def describe_machine() -> Machine:
    """Return CPU, cores this process may use, memory, system and package versions."""
    return Machine(
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        instruction_sets=tuple(flag for flag in _cpu_flags() if flag in _INTERESTING),
        system=platform.platform(),
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
        engine_sha256=sha256_of(engine) if (engine := library_path()).is_file() else None,
    )


_INTERESTING = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo(*keys: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    return _cpuinfo("flags", "Features").split()


def provenance(noise: Noise | None = None) -> Provenance:
    """Return what every committed result carries: machine, date, commit and command.

    Args:
      noise: of the machine, where speed was measured.
    """
    return Provenance(
        machine=describe_machine(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=_commit_of_command(),
        command=without_folders(" ".join(["jaxgpt-bench", *sys.argv[1:]])),
        noise=noise,
    )


def _commit_of_command() -> str:
    """Return the commit with which this process began, with "-changed" where the tree is another one by now.

    Then other code may have run than that of either.
    """
    return _BEGUN if _code() == _CODE_BEGUN else f"{_BEGUN}-changed"


def commit(root: Path = ROOT) -> str:
    """Return the commit of a source tree, with "-dirty" when code was changed or added.

    Args:
      root: its top folder.

    Returns:
      "unknown" where that is no git checkout: an installed package may lie inside another project's.
    """
    if not (root / ".git").exists():
        return "unknown"
    try:
        found = _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
        added = _git(root, "ls-files", "--others", "--exclude-standard", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found}-dirty" if added and not found.endswith("-dirty") else found


def _git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def _code(root: Path = ROOT) -> str:
    """Return what tells a source tree's code from another: its commit, and what was changed beside it."""
    if not (root / ".git").exists():
        return "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        changed = _git(root, "diff", "HEAD", "--", *CODE)
        added = _git(root, "ls-files", "--others", "--exclude-standard", *CODE)
        return f"{_git(root, 'rev-parse', 'HEAD')} {changed} {added}"
    return "unknown"


_BEGUN, _CODE_BEGUN = commit(), _code()  # commands import this before they measure
