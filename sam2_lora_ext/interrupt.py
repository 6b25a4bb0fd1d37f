"""SIGTERM and Ctrl-C end a training after the running step, on all ranks together, instead of in the middle of it."""

import os
import signal
import threading
from types import FrameType

DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class Interrupt:
    """Remembers the first signal; the same one again ends the process at once.

    Handlers that somebody else has set stay as they are: submitit ignores SIGTERM and requeues on USR2.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._replaced: list[signal.Signals] = []

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._replaced = [number for number, usual in DEFAULTS.items() if signal.getsignal(number) == usual]
        for number in self._replaced:
            signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number in self._replaced:
            signal.signal(number, DEFAULTS[number])
        self._replaced = []

    def _remember(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signum == number:
            self.__exit__()
            os.kill(os.getpid(), number)
        elif (
            not self.signum
        ):  # another one may follow the first: torch sends spawned ranks SIGINT when their parent dies
            self.signum = number
            os.write(2, f"{name}: the training ends after this step; once more ends it at once\n".encode())
