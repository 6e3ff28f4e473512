"""SIGINT and SIGTERM: what is under way is finished and saved, and then it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Stopped(KeyboardInterrupt):
    """A training has ended because it was asked to; what it says is where it stands."""


class Stop:
    """Whether this process was asked to end, from `with Stop() as stop` on.

    A signal ends what runs inside by KeyboardInterrupt, as SIGINT always does; `with stop.deferred()` only notes it, for a
    training that looks at `wanted` between its steps. There a second SIGINT is a KeyboardInterrupt. Signals go to the main
    thread, so in any other `wanted` stays False.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.wanted and number == signal.SIGINT
        self.wanted = True
        if again or not self._deferred:
            raise KeyboardInterrupt
