"""Signals that ask a run to stop, at a step that was saved."""

import os
import signal
import threading
from typing import Any


class Interrupt:
    """While it is entered, SIGINT and SIGTERM (a preemption) ask for a stop after the step.

    In another thread than the main one, which alone hears of signals, nothing asks.
    """

    def __enter__(self) -> "Interrupt":
        self.asked = False
        here = threading.current_thread() is threading.main_thread()
        asking = (signal.SIGINT, signal.SIGTERM) if here else ()
        self._old = {s: signal.signal(s, self._ask) for s in asking}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:  # the second time means now
            raise KeyboardInterrupt
        self.asked = True
        # print may be what was interrupted, and cannot be entered twice.
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
