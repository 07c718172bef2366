"""Asks a run to stop between two steps: SIGTERM, as schedulers send it, and Ctrl-C.

Knows nothing about what is being run.
"""

import signal
import threading
from types import FrameType

from sharding.distributed import Processes


class StopRequest:
    """While entered, the first SIGTERM or SIGINT only takes note; a second one acts as usual.

    Outside the main thread, where Python takes no signals, it never asks.

    Attributes:
        signal_name: of the signal that this process got, or None.
    """

    def __init__(self, processes: Processes | None = None):
        """For one process, or for one of several that stop together."""
        self.signal_name: str | None = None
        self._processes = processes
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def agreed(self) -> str | None:
        """Says whether to stop here, and for which signal.

        In one process: `signal_name`. With several, every process calls this at the same points,
        and the same call gives all of them the same answer, whichever got the signal.
        """
        if self._processes is None or self._processes.count == 1:
            return self.signal_name
        return self._processes.agreed()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if self._processes is not None:
            self._processes.ask_to_stop(self.signal_name)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyrefly: ignore[bad-argument-type]
        self._previous = {}
