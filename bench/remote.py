"""A process that is kept warm: it does what it is asked, one request after the other, and sleeps between."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Remote:
    """The side that asks.

    Args:
        process: Runs ``serve``.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self.requests, self.answers = process, process.stdin, process.stdout

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.process.wait()
        self.answers.close()

    @contextlib.contextmanager
    def failing(self, error: type[Exception]) -> Iterator[None]:
        """Says that the process has failed where that is what an error means."""
        try:
            yield
        except error:
            status = self.process.wait()
            raise RuntimeError(f"a measuring process failed with status {status}") from None

    def tell(self, what: str, *arguments: Any) -> None:
        """Asks without waiting for the answer."""
        with self.failing(BrokenPipeError):
            pickle.dump((what, arguments), self.requests)
            self.requests.flush()

    def answer(self) -> Any:
        """Waits for the answer, and returns it."""
        with self.failing(EOFError):
            return pickle.load(self.answers)

    def ask(self, what: str, *arguments: Any) -> Any:
        self.tell(what, *arguments)
        return self.answer()


def serve(methods: Mapping[str, Callable[..., Any]]) -> None:
    """Answers until the other side closes. What a library prints goes to the error output."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while True:
        try:
            what, arguments = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(methods[what](*arguments), answers)
        answers.flush()
