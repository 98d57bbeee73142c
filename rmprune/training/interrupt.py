"""Ctrl-C between two steps instead of within one, so that the checkpoint it leaves continues exactly."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """While entered, the first Ctrl-C only sets `requested`; a second one interrupts at once.

    So does SIGTERM, which the command line hands on with its own number; where Ctrl-C is ignored, as with `&` in a script, it stays so.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: object = None

    def __enter__(self) -> DeferredInterrupt:
        before = signal.getsignal(signal.SIGINT)
        usual = before in (signal.default_int_handler, signal.SIG_IGN)
        if usual and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handle)
            self._before = before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._before is signal.SIG_IGN:
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
