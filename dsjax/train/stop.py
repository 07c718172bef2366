"""Asks a run to stop between two steps: SIGTERM, as schedulers send it, and Ctrl-C.

Knows nothing about what is being run.
"""

import signal
import threading
from types import FrameType


class StopRequest:
    """While entered, the first SIGTERM or SIGINT only takes note; a second one acts as usual.

    Outside the main thread, where Python takes no signals, it never asks.
    """

    def __init__(self):
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyrefly: ignore[bad-argument-type]
        self._previous = {}
