"""SIGINT and SIGTERM: what is under way is finished and saved, and then it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A training has ended because it was asked to; what it says is where it stands."""


class Stop:
    """Whether this process was asked to end, from `with Stop() as stop` on.

    A signal ends what runs inside by KeyboardInterrupt, as SIGINT always does; `with stop.deferred()` only notes it, for a
    training that looks at `wanted` between its steps. There a second SIGINT is a KeyboardInterrupt. Signals go to the main
    thread, so in any other `wanted` stays False.

    Args:
        alone: whether there is one process. One of several may be waiting for the others, in a library that does not look
            at what was noted: until it has something to save, a signal ends it as it ends any program.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.wanted, self.alone = False, alone
        self._before: list[Any] = []  # handlers; none where it was not entered

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = _handled_by(self._end if self.alone else signal.SIG_DFL)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _handled_by(*self._before)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        before = _handled_by(self._note) if self._before else []
        try:
            yield
        finally:
            _handled_by(*before)

    def check(self) -> None:
        """KeyboardInterrupt where it was asked for."""
        if self.wanted:
            raise KeyboardInterrupt

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.wanted and number == signal.SIGINT
        self.wanted = True
        if again:
            raise KeyboardInterrupt


def _handled_by(*handlers: Any) -> list[Any]:
    """Sets the handler of both signals, or one of each; what they were."""
    both = handlers * 2 if len(handlers) == 1 else handlers
    return [signal.signal(number, handler) or signal.SIG_DFL for number, handler in zip(SIGNALS, both, strict=False)]
