"""Loading: with kernels, without, with broken ones, and with a forced instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import torchrnn
from torchrnn import _native

PACKAGE = Path(torchrnn.__file__).parent
pure = pytest.mark.skipif(_native.WHY_NOT is not None, reason="needs the kernels")


def python(code: str, *flags: str, cwd: Path = PACKAGE.parent, **variables: str) -> Any:
    """Runs code in a new interpreter, which finds the package in cwd."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHRNN_")}
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        env=environment | variables,
        cwd=cwd,
        check=False,
    )


def test_kernels_are_loaded_unless_they_were_asked_away() -> None:
    # Without this a build that fails to load would pass all other tests on the reference.
    if os.environ.get("TORCHRNN_PURE"):
        assert _native.WHY_NOT == "TORCHRNN_PURE is set"
    else:
        assert _native.WHY_NOT is None
    if os.environ.get("FAIL_WITHOUT_CUDA"):
        assert _native.WHY_NOT_CUDA is None


def test_import_in_a_fresh_interpreter_is_silent_and_compiles_nothing() -> None:
    code = (
        "import sys, torchrnn; assert 'torch.utils.cpp_extension' not in sys.modules;"
        "print(torchrnn.__version__)"
    )
    done = python(code, "-W", "error")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == torchrnn.__version__
    assert done.stderr == ""


@pure
def test_info_tells_what_is_loaded() -> None:
    info = torchrnn.info()
    assert info["kernels"] == (["cpu", "cuda"] if info["why_not_cuda"] is None else ["cpu"])
    assert info["why_not"] is None
    assert info["why_not_cuda"] == _native.WHY_NOT_CUDA
    assert info["isa"] in info["isas"]
    assert info["dtypes"] == ["float32", "float64", "bfloat16", "float16"]


def test_pure_runs_on_the_reference_without_a_warning() -> None:
    code = (
        "import torch, torchrnn; i = torchrnn.info(); assert i['kernels'] == [] and i['isa'] is None, i;"
        "print(i['why_not']); y, _ = torchrnn.LSTM(3, 4)(torch.randn(5, 2, 3)); y.sum().backward()"
    )
    done = python(code, "-W", "error", TORCHRNN_PURE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "TORCHRNN_PURE is set"


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_missing_or_broken_library_warns_once_and_works(tmp_path: Path, broken: bool) -> None:
    shutil.copytree(PACKAGE, tmp_path / "torchrnn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if broken:
        (tmp_path / "torchrnn" / "_C.abi3.so").write_bytes(b"not a library")
    code = (
        "import sys, warnings\n"
        # An editable install would find the library of the original.
        f"if not {broken}: sys.modules['torchrnn._C'] = None\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, torchrnn\n"
        "    y, _ = torchrnn.GRU(3, 4)(torch.randn(5, 2, 3))\n"
        "    y.sum().backward()\n"
        "ours = [w for w in seen if 'reference on cpu' in str(w.message)]\n"
        "assert len(ours) == 1 and ours[0].category is RuntimeWarning, seen\n"
        "print(torchrnn.__file__, torchrnn.info()['why_not'])\n"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "ImportError" in done.stdout or "ModuleNotFoundError" in done.stdout


@pytest.mark.parametrize("pure", ["0", "1"])
def test_cuda_library_is_left_alone_where_torch_is_without_cuda(tmp_path: Path, pure: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "torchrnn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "torchrnn" / "_C_cuda.py").write_text("raise AssertionError('imported')")
    code = (
        "import torch; torch.version.cuda = None; import torchrnn;"
        "i = torchrnn.info(); assert 'cuda' not in i['kernels']; print(i['why_not_cuda'])"
    )
    done = python(code, cwd=tmp_path, TORCHRNN_PURE=pure)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("TORCHRNN_PURE is set" if pure == "1" else "torch is without CUDA")


@pytest.mark.parametrize("devices", [0, 1])
@pytest.mark.parametrize("library", ["there", "broken", "missing"])
def test_cuda_library_that_does_not_load_is_told_of_where_there_is_a_gpu(
    tmp_path: Path, library: str, devices: int
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "torchrnn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library == "broken":
        (tmp_path / "torchrnn" / "_C_cuda.abi3.so").write_bytes(b"not a library")
    elif library == "there":
        (tmp_path / "torchrnn" / "_C_cuda.py").write_text("")
    code = (
        "import sys, warnings\n"
        f"if {library!r} == 'missing': sys.modules['torchrnn._C_cuda'] = None\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch\n"
        "    torch.version.cuda, torch.backends.cuda.is_built = '13.0', lambda: True\n"
        f"    torch.cuda.device_count = lambda: {devices}\n"
        "    import torchrnn\n"
        "print(sum('reference on cuda' in str(w.message) for w in seen))\n"
        "print('cuda' in torchrnn.info()['kernels'], torchrnn.info()['why_not_cuda'])\n"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count, result = done.stdout.splitlines()
    assert int(count) == (devices if library != "there" else 0)
    expected = {
        "there": "True None",
        "broken": "False ImportError: ",
        "missing": "False ModuleNotFoundError: ",
    }
    assert result.startswith(expected[library])


@pure
@pytest.mark.parametrize("name", _native.ISAS)
def test_environment_forces_the_instruction_set(name: str) -> None:
    done = python("import torchrnn; print(torchrnn.info()['isa'])", TORCHRNN_ISA=name)
    if name in _native.isas():
        assert done.stdout.strip() == name
    else:
        assert "ValueError: TORCHRNN_ISA: isa must be one of" in done.stderr


@pure
def test_unknown_instruction_sets_are_refused() -> None:
    done = python("import torchrnn", TORCHRNN_ISA="sse9")
    assert "ValueError: TORCHRNN_ISA: isa must be one of generic" in done.stderr
    assert "got 'sse9'" in done.stderr
    before = _native.isa()
    with pytest.raises(ValueError, match="isa must be one of"):
        _native.set_isa("sse9")
    assert _native.isa() == before
