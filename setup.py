"""Builds the compiled extensions ``torchrnn._C`` and ``torchrnn._C_cuda``; all metadata is in pyproject.toml.

Environment:
    TORCHRNN_PURE=1 leaves both out: a pure-Python package, built without compiler and torch.
    TORCHRNN_CUDA=1 builds ``_C_cuda`` also where torch is without CUDA, 0 leaves it out. Without the variable
        it is built where torch has CUDA and there is an nvcc: that of CUDA_HOME, else the one on PATH.
    TORCH_CUDA_ARCH_LIST has the GPU architectures, such as "8.0;9.0+PTX".
    MAX_JOBS is the number of compilers at a time.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PURE = os.environ.get("TORCHRNN_PURE", "0") not in {"", "0"}

CXX_FLAGS = [
    "-std=c++20",  # Else torch 2.11 takes C++17.
    "-O3",
    "-g0",  # Python's own flags may hold -g: without this the library is many times larger.
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    # Neither errno nor the exception flags are read. NaN and Inf keep their meaning: no -ffast-math.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    # The kernels do it where they end: see ZeroUpper in csrc/cpu/team.h.
    *(["-mno-vzeroupper"] if platform.machine() in {"x86_64", "AMD64"} else []),
    # Paths in error messages start at the project root, wherever the build happens.
    f"-fmacro-prefix-map={ROOT}{os.sep}=",
    # The stable ABI of torch 2.11 and of CPython 3.10, so that one binary serves all later versions.
    # There is no -march here: each file of csrc/cpu names its own instruction set, chosen at run time.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DTORCH_STABLE_ONLY",
    "-DPy_LIMITED_API=0x030A0000",  # Spelt as torch does, which defines it again.
]

CUDA = "torchrnn._C_cuda"
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-Icsrc",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v,-warn-spills",  # What tests/cuda/registers.py reads.
]
ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
CLUSTER = 90  # What csrc/cuda/cluster_*.cu needs: before sm_90 there are no clusters.


def find_nvcc() -> str | None:
    """Returns the path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def output(*command: str) -> str:
    """Returns what a command writes, to both streams."""
    return subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout


def architectures(nvcc: str) -> list[tuple[str, bool]]:
    """Returns what to compile for: numbers such as "90" or "90a", and whether PTX of it goes along."""
    known = set(re.findall(r"sm_(\d+)", output(nvcc, "--list-gpu-code")))
    asked = re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; "))
    if asked == [""]:
        asked = [name for name in ARCHITECTURES if name.replace(".", "") in known]
        asked[-1] += "+PTX"
    result = []
    for name in asked:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None or match[1] + match[2] not in known:
            raise CompileError(
                f'TORCH_CUDA_ARCH_LIST must have items such as "9.0", "9.0a" or "9.0+PTX", got {name!r}; '
                f"{nvcc} knows {', '.join(sorted(known, key=int))}"
            )
        result.append((match[1] + match[2] + match[3], match[4] is not None))
    return result


def gencode(targets: list[tuple[str, bool]], cluster: bool) -> list[str]:
    """Returns nvcc's flags for the architectures; at least one that has clusters where they are needed."""
    if cluster:
        targets = [target for target in targets if int(target[0].rstrip("af")) >= CLUSTER]
        targets = targets or [(str(CLUSTER), False)]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name, _ in targets]
    return flags + [f"-gencode=arch=compute_{name},code=compute_{name}" for name, ptx in targets if ptx]


def compile_kernels(nvcc: str, folder: Path) -> list[str]:
    """Compiles csrc/cuda/*.cu, as far as they have changed, and returns the objects.

    torch's own way, CUDAExtension, refuses to work with a torch without CUDA. ninja knows what has changed:
    sources, headers and flags. What nvcc says is kept beside each object.
    """
    targets = architectures(nvcc)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    escape = str.maketrans({"$": "$$", " ": "$ ", ":": "$:"})
    rules = [f"builddir = {str(folder).translate(escape)}"]
    objects = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        item, log = str(folder / f"{source.stem}.o"), shlex.quote(str(folder / f"{source.stem}.log"))
        command = [nvcc, *NVCC_FLAGS, *gencode(targets, source.stem.startswith("cluster_"))]
        command += ["-MD", "-MF", f"{item}.d", "-c", str(source), "-o", item]
        line = f"{shlex.join(command)} >{log} 2>&1 || {{ cat {log}; false; }}".replace("$", "$$")
        rules += [
            f"rule {source.stem}",
            f"  command = {line}",
            f"  description = nvcc {source}",
            f"  depfile = {item.translate(escape)}.d",
            "  deps = gcc",
            f"build {item.translate(escape)}: {source.stem} {source}",
        ]
        objects.append(item)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    subprocess.run(["ninja", "-f", str(folder / "build.ninja"), "-j", str(jobs)], check=True)
    return objects


def compiled() -> dict:
    """Returns the arguments of ``setup`` that build the extensions."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    def extension(name: str, sources: list[Path], *flags: str) -> CppExtension:
        # As system headers, torch's own give no warnings; their -I, which torch passes too, is then ignored.
        system = [f"-isystem{path}" for path in include_paths()]
        return CppExtension(
            name,
            sources=[str(path) for path in sources],
            # Without this setuptools takes the library for up to date when only a header has changed.
            depends=[str(path) for path in sorted(Path("csrc").rglob("*.h"))],
            include_dirs=[str(ROOT / "csrc")],  # Absolute, because ninja runs in the build folder.
            extra_compile_args={"cxx": [*CXX_FLAGS, *flags, *system]},
            py_limited_api=True,
        )

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                for item in self.extensions:
                    if item.name == CUDA:
                        self.add_kernels(item)
                super().build_extensions()
            except Exception as error:
                raise CompileError(
                    f"torchrnn's kernels were not built ({error}). They need a C++20 compiler; "
                    "TORCHRNN_PURE=1 pip install ... installs torchrnn without them, TORCHRNN_CUDA=0 without "
                    "those for CUDA."
                ) from error

        def add_kernels(self, item: CppExtension) -> None:
            nvcc = find_nvcc()
            if nvcc is None:
                raise CompileError("TORCHRNN_CUDA=1 needs nvcc, in bin of CUDA_HOME or on PATH")
            item.extra_objects = compile_kernels(nvcc, Path(self.build_temp) / "nvcc")
            # nvcc may be a script that calls another one, so it is asked where its toolkit is.
            toolkit = output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
            headers = re.findall(r'INCLUDES="-I(.+?)"', toolkit)
            item.extra_compile_args["cxx"] += [f"-isystem{path}" for path in headers]
            item.library_dirs += re.findall(r'"-L(.+?)"', toolkit)
            # Static, so that any CUDA that torch comes with will do.
            item.libraries += ["cudart_static", "rt", "pthread", "dl"]
            # Nothing here uses libtorch itself, through which libtorch_cuda is found when this is loaded.
            item.extra_link_args += ["-Wl,--no-as-needed", "-ltorch"]

    sources = [Path("csrc/module.cpp"), *sorted(Path("csrc/cpu").glob("*.cpp"))]
    extensions = [extension("torchrnn._C", sources)]
    wanted = os.environ.get("TORCHRNN_CUDA", "")
    if wanted not in {"", "0"} or (wanted == "" and torch.version.cuda and find_nvcc()):
        extensions.append(extension(CUDA, sorted(Path("csrc/cuda").glob("*.cpp")), "-DUSE_CUDA"))
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


os.chdir(ROOT)  # The globs above and the sources that setuptools reads are relative to the project.
setup(**({} if PURE else compiled()))
