"""``when_imported`` changes a module once it is there, however and whenever it is imported."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchrnn._tools.imports import _waiting, when_imported

NAME = "waited_for.inner"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the source of the module ``NAME`` is."""
    (tmp_path / "waited_for").mkdir()
    (tmp_path / "waited_for" / "__init__.py").touch()
    source = tmp_path / "waited_for" / "inner.py"
    source.write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield source
    _waiting.pop(NAME, None)
    for name in ("waited_for", NAME):
        sys.modules.pop(name, None)


def test_after_the_module_has_been_executed(package: Path) -> None:
    for factor in (3, 5):
        when_imported(NAME, lambda module, factor=factor: setattr(module, "value", module.value * factor))
    assert NAME not in sys.modules
    assert importlib.import_module(NAME).value == 15
    assert importlib.reload(sys.modules[NAME]).value == 1


def test_at_once_if_it_is_there(package: Path) -> None:
    module = importlib.import_module(NAME)
    when_imported(NAME, lambda module: setattr(module, "value", 7))
    assert module.value == 7


def test_a_look_and_a_failure_do_not_use_it_up(package: Path) -> None:
    when_imported(NAME, lambda module: setattr(module, "value", 7))
    assert importlib.util.find_spec(NAME) is not None
    package.write_text("raise RuntimeError\n")
    with pytest.raises(RuntimeError):
        importlib.import_module(NAME)
    package.unlink()
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(NAME)
    package.write_text("longer_than_before = value = 1\n")
    importlib.invalidate_caches()
    assert importlib.import_module(NAME).value == 7


def test_importing_torchrnn_imports_none_of_the_tools() -> None:
    tools = ["torch._dynamo", "torch.utils.flop_counter", "torch.ao.quantization.fx.tracer"]
    code = "import sys, torch; before = set(sys.modules); import torchrnn; new = set(sys.modules) - before\n"
    code += f"assert new.isdisjoint({tools}), new"
    subprocess.run([sys.executable, "-c", code], check=True)
