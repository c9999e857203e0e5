"""The build of the CUDA library, and the checks of ``make cuda-check``, which must fail when they should."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NVCC = "#!/bin/sh\nprintf 'sm_80\\nsm_90\\nsm_120\\nrelease 13.0, V13.0.88\\n'\n"


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    """A compiler that knows three architectures and compiles nothing."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(NVCC)
    path.chmod(0o755)
    return path


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCHRNN_PURE", "1")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr("setuptools.setup", lambda: None)
    return runpy.run_path("setup.py")


def test_nvcc_is_that_of_cuda_home_and_else_on_path(
    setup: dict[str, Any], nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert setup["find_nvcc"]() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup["find_nvcc"]() == str(nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert setup["find_nvcc"]() is None
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert setup["find_nvcc"]() == str(nvcc)


@pytest.mark.parametrize(
    ("asked", "targets"),
    [
        (None, [("80", False), ("90", False), ("120", True)]),
        ("8.0;9.0+PTX", [("80", False), ("90", True)]),
        (" 8.0 9.0a ", [("80", False), ("90a", False)]),
        ("12.0;", [("120", False)]),
    ],
)
def test_architectures_are_those_asked_for_or_those_known(
    setup: dict[str, Any], nvcc: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, targets: Any
) -> None:
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert setup["architectures"](str(nvcc)) == targets


@pytest.mark.parametrize("asked", ["7.0", "90", "Hopper", "9.0+ptx", "8.0,9.0"])
def test_unknown_architectures_are_refused(
    setup: dict[str, Any], nvcc: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0 {asked}")
    with pytest.raises(
        Exception, match=f"TORCH_CUDA_ARCH_LIST .* got '{asked.replace('+', '.')}'.*80, 90, 120"
    ):
        setup["architectures"](str(nvcc))


def test_kernels_with_clusters_are_compiled_from_sm_90_on(setup: dict[str, Any]) -> None:
    gencode = setup["gencode"]
    assert gencode([("80", False), ("90a", True)], cluster=True) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    assert gencode([("80", True)], cluster=False) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    # ops.cpp calls their launchers, so that the library needs them whatever was asked for.
    assert gencode([("80", True)], cluster=True) == ["-gencode=arch=compute_90,code=sm_90"]


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8torchrnn4cuda12_GLOBAL__N_15scaleIfEEvPT_i' for 'sm_80'
ptxas info    : Function properties for _ZN8torchrnn4cuda12_GLOBAL__N_15scaleIfEEvPT_i
    0 bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for __internal_accurate_pow
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 128 bytes smem, 364 bytes cmem[0]
{more}"""


def registers(folder: Path, nvcc: Path, *flags: str, **values: Any) -> Any:
    """Runs registers.py on a log with one kernel, which takes 40 registers unless told otherwise."""
    (folder / "step.log").write_text(LOG.format(**{"stores": 0, "registers": 40, "more": ""} | values))
    command = [sys.executable, str(HERE / "registers.py"), str(folder), "--nvcc", str(nvcc)]
    command += ["--table", str(folder / "table.json"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_register_table_fails_on_growth_spills_and_warnings(tmp_path: Path, nvcc: Path) -> None:
    assert registers(tmp_path, nvcc, "--update").returncode == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["kernels"] == {"step.cu scale<float>": {"80": [40, 128, 0, 0]}}

    assert registers(tmp_path, nvcc).returncode == 0
    assert registers(tmp_path, nvcc, registers=39).returncode == 0
    for expected, values in {
        "scale<float>, sm_80: 41 registers, in the table 40": {"registers": 41},
        "scale<float>, sm_80: 4 bytes of spills": {"stores": 4},
        "ptxas warning : something": {"more": "ptxas warning : something"},
        "step.cu scale<double>: not in the table": {
            "more": LOG.format(stores=0, registers=8, more="").replace("scaleIf", "scaleId")
        },
    }.items():
        done = registers(tmp_path, nvcc, **values)
        assert done.returncode == 1, expected
        assert expected in done.stderr

    assert registers(tmp_path, nvcc, "--update", stores=4).returncode == 1

    table["kernels"]["step.cu gone"] = {"80": [40, 128, 0, 0]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    assert "step.cu gone: in the table, but not compiled" in registers(tmp_path, nvcc).stderr

    nvcc.write_text(NVCC.replace("13.0", "12.9"))
    done = registers(tmp_path, nvcc, registers=41)
    assert done.returncode == 0
    assert "of nvcc 13.0 and not 12.9" in done.stdout


OPS = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/dispatch.h"

namespace torchrnn {
namespace cuda {
int compute_capability(int) { return 0; }
const char* cluster_why_not(const ForwardScan<float>&, int, int) { return ""; }
}  // namespace cuda
namespace {
using torch::stable::Tensor;
Tensor dropout(const Tensor& x, const Tensor&, TYPE) { return x; }
}  // namespace
}  // namespace torchrnn

STABLE_TORCH_LIBRARY_IMPL(torchrnn, CUDA, m) { m.impl("NAME", TORCH_BOX(&torchrnn::dropout)); }
"""


@pytest.mark.parametrize(
    ("name", "argument", "error"),
    [
        ("dropout", "double", ""),
        ("dropout", "bool", "Tensor (Tensor, Tensor, bool)\nbut its schema asks for"),
        ("drop", "double", "drop has no schema"),
    ],
)
def test_schemas_are_compared_with_the_compiled_functions(
    tmp_path: Path, name: str, argument: str, error: str
) -> None:
    source, library = tmp_path / "ops.cpp", tmp_path / "_C_cuda.abi3.so"
    source.write_text(OPS.replace("NAME", name).replace("TYPE", argument))
    module = ROOT / "csrc" / "cuda" / "module.cpp"
    flags = ["-std=c++20", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f"-I{path}" for path in (ROOT / "csrc", *include_paths(), sysconfig.get_path("include"))]
    libraries = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
    subprocess.run(["g++", *flags, str(source), str(module), "-o", str(library), *libraries], check=True)
    done = subprocess.run(
        [sys.executable, str(HERE / "schemas.py"), str(library), str(source)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHRNN_PURE": "1"},
    )
    assert done.returncode == (1 if error else 0), done.stderr
    assert error in done.stderr
