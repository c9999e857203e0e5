"""Builds the compiled extension ``torchrnn._C``; all metadata is in pyproject.toml.

``TORCHRNN_PURE=1`` leaves the extension out: a pure-Python package, built without compiler and torch.
"""

import os
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PURE = os.environ.get("TORCHRNN_PURE", "0") not in {"", "0"}

CXX_FLAGS = [
    "-O3",
    "-g0",  # Python's own flags may hold -g: without this the library is many times larger.
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    # Neither errno nor the exception flags are read. NaN and Inf keep their meaning: no -ffast-math.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    # Paths in error messages start at the project root, wherever the build happens.
    f"-fmacro-prefix-map={ROOT}{os.sep}=",
    # The stable ABI of torch 2.11 and of CPython 3.10, so that one binary serves all later versions.
    # There is no -march here: each file of csrc/cpu names its own instruction set, chosen at run time.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DTORCH_STABLE_ONLY",
    "-DPy_LIMITED_API=0x030A0000",  # Spelt as torch does, which defines it again.
]


def compiled() -> dict:
    """Returns the arguments of ``setup`` that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                raise CompileError(
                    f"torchrnn._C was not built ({error}). It needs a C++20 compiler; "
                    "TORCHRNN_PURE=1 pip install ... installs torchrnn without it."
                ) from error

    sources = [Path("csrc/module.cpp"), *sorted(Path("csrc/cpu").glob("*.cpp"))]
    extension = CppExtension(
        "torchrnn._C",
        sources=[str(path) for path in sources],
        # Without this setuptools takes the library for up to date when only a header has changed.
        depends=[str(path) for path in sorted(Path("csrc").rglob("*.h"))],
        include_dirs=[str(ROOT / "csrc")],  # Absolute, because ninja runs in the build folder.
        # As system headers, torch's own give no warnings; their -I, which torch passes too, is then ignored.
        extra_compile_args={"cxx": [*CXX_FLAGS, *(f"-isystem{path}" for path in include_paths())]},
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


os.chdir(ROOT)  # The globs above and the sources that setuptools reads are relative to the project.
setup(**({} if PURE else compiled()))
