"""Calls back when a module is imported, so that ``import torchrnn`` does not have to import it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

_Change = Callable[[ModuleType], None]

_waiting: dict[str, list[_Change]] = {}


def when_imported(name: str, change: _Change) -> None:
    """Calls ``change`` with a module: at once if it is imported, else right after it has been executed."""
    if name in sys.modules:
        change(sys.modules[name])
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _waiting.setdefault(name, []).append(change)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what is waited for as the finders after it do, and adds the changes to its execution."""

    def __init__(self) -> None:
        self.asking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _waiting or fullname in self.asking:
            return None
        self.asking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking.remove(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for change in _waiting.pop(fullname, []):
                change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
