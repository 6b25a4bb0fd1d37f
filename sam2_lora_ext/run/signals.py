"""Ends a training after the current step on SIGTERM or Ctrl-C, on all ranks together."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from sam2_lora_ext.utils.command_line import interrupt

TWICE = 1.0  # seconds within which equal signals count as one: the terminal and the parent process may both send it
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler, interrupt)  # handlers that only end the process


def _replace_defaults(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Sets a handler for SIGTERM and SIGINT where a default one is set; returns the handlers replaced."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    return {number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) in DEFAULTS}


class Interrupt:
    """Remembers the first signal; the same signal a second or more later ends the process at once.

    Existing handlers are kept: submitit ignores SIGTERM and requeues on USR2.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._first = 0.0
        self._replaced: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._replaced = _replace_defaults(self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._first = number, time.monotonic()
            name = signal.Signals(number).name
            os.write(2, f"{name}: the training ends after this step; repeat it to end at once\n".encode())
        elif self.signum == number and time.monotonic() - self._first > TWICE:
            # not a different signal: torch sends spawned ranks SIGINT when their parent dies
            self.__exit__()
            os.kill(os.getpid(), number)


class Forward:
    """Forwards SIGTERM and Ctrl-C to the ranks that this process started, and waits for their end.

    Existing handlers are kept: the ranks ignore a signal that is ignored here.

    Attributes:
        signum: the first signal; 0 for none.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> "Forward":
        self._replaced = _replace_defaults(self._hand_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.signum = self.signum or number
        children = multiprocessing.active_children()
        if not children:
            raise SystemExit(128 + number)
        for child in children:
            os.kill(child.pid, number)
