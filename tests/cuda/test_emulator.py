"""The host's stand-in for the GPU, on which CUDA kernels are tested: does it compute, and does it notice."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from host_build import CSRC, emulated

from gpu.run import cuda_tool

HERE = Path(__file__).parent
SEEDS = 50

Program = Callable[..., "subprocess.CompletedProcess[str]"]


def build(folder: Path, source: str, *flags: str) -> Program:
    """Compiles a program for the host; what it returns runs that with the given arguments."""
    program = emulated(folder, source, *flags)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return build(tmp_path_factory.mktemp("emulator"), "emulator_test.cpp")


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return build(tmp_path_factory.mktemp("protocol"), "protocol_test.cpp")


@pytest.fixture(scope="module")
def watched_protocol(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The same under ThreadSanitizer."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    try:
        probe = build(folder, str(folder / "probe.cpp"), "-fsanitize=thread")()
    except subprocess.CalledProcessError:
        pytest.skip("needs a compiler with ThreadSanitizer")
    if probe.returncode != 0:
        pytest.skip(f"ThreadSanitizer does not run here: {probe.stderr.strip()}")
    return build(folder, "protocol_test.cpp", "-g", "-fsanitize=thread")


@pytest.mark.parametrize(
    "test", ["conversions", "matrix_product", "matrix_moves", "whole_kernel", "places", "barriers", "phases"]
)
def test_instructions_match_their_definition(emulator: Program, test: str) -> None:
    done = emulator(test)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ("lanes_apart", " meets "),
        ("no_such_rank", "no such CTA"),
        ("out_of_bounds", "not in shared memory"),
        ("misaligned", "not aligned to 16 bytes"),
        ("overwritten", "mbarrier was overwritten"),
        ("arrived_twice", "more arrivals"),
    ],
)
def test_misuse_is_an_error(emulator: Program, misuse: str, message: str) -> None:
    done = emulator(misuse)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout


def test_protocol_is_right_in_any_order(protocol: Program) -> None:
    done = protocol("none", SEEDS)
    assert done.stdout.splitlines() == ["right"] * SEEDS, done.stderr


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        ("wait", ["a wrong number"]),
        ("parity", ["more arrivals", "deadlock", "a wrong number"]),
        ("arm", ["deadlock"]),
        ("one_buffer", ["a wrong number"]),
        ("fence", ["without fence_mbarrier_init"]),
        ("first_barrier", ["before mbarrier_init"]),
        ("last_wait", ["after the exit of CTA"]),
        (
            "return",
            ["deadlock; 1 threads of CTA 0 have returned; 63 threads of CTA 0 wait for mbarrier_wait("],
        ),
    ],
)
def test_broken_protocol_is_noticed(protocol: Program, fault: str, messages: list[str]) -> None:
    done = protocol(fault, SEEDS)
    assert done.returncode == 0, done.stderr
    noticed = [line for line in done.stdout.splitlines() if line != "right"]
    assert noticed
    for line in noticed:
        assert any(message in line for message in messages), line


def test_thread_sanitizer_sees_no_race_in_the_protocol(watched_protocol: Program) -> None:
    done = watched_protocol("none", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["right"] * 3


@pytest.mark.parametrize("fault", ["wait", "one_buffer", "same_value"])
def test_thread_sanitizer_sees_races(watched_protocol: Program, fault: str) -> None:
    done = watched_protocol(fault, 3)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("architecture", ["90", "90a"])
def test_nvcc_takes_every_instruction(tmp_path: Path, architecture: str) -> None:
    nvcc = cuda_tool("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc, in bin of CUDA_HOME or on PATH")
    done = subprocess.run(
        [
            *(nvcc, "-std=c++20", "-O3", f"-I{CSRC}", "-Werror", "all-warnings"),
            *("-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror"),
            *("-gencode", f"arch=compute_{architecture},code=sm_{architecture}"),
            *("-c", HERE / "ptx_check.cu", "-o", tmp_path / "ptx_check.o"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
