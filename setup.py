"""Builds the native engine where a C++ compiler is there; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("export/native")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-wrapv",  # Python's own flags may say otherwise; addresses are then computed anew in each step
    "-ffp-contract=off",  # a fused multiply-add rounds once where model/arithmetic.py says twice
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-pthread",
]


class PlainLibrary(build_ext):
    """Names the file native/libengine.so: no Python module, native/library.py loads it with ctypes."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path of the library, as far as the package's folder is concerned."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class AnyPython(bdist_wheel):
    """Tags the wheel for its platform only: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, ABI and platform tags."""
        return ("py3", "none", super().get_tag()[2])


engine = Extension(
    "jaxgpt_export.native.libengine",
    sources=sorted(str(path) for path in NATIVE.glob("**/*.cpp")),
    depends=sorted(str(path) for pattern in ("**/*.h", "**/*.inl") for path in NATIVE.glob(pattern)),
    include_dirs=[str(NATIVE)],
    language="c++",
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    optional=True,  # without a compiler the PyTorch module serves
)

setup(ext_modules=[engine], cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython})
