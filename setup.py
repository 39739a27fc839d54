"""Builds the native engine beside the Python code, where a C++ compiler is there; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("export/native")

engine = Extension(
    "export._engine",  # a plain shared library with a C interface: export/engine.py loads it with ctypes
    sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
    depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in NATIVE.glob(pattern)),
    language="c++",
    # No contraction: a fused multiply-add rounds once where export/arithmetic.py says twice.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-pthread",
    ],
    extra_link_args=["-pthread"],
    optional=True,  # without a compiler the PyTorch module serves
)

setup(ext_modules=[engine])
