"""SIGTERM and Ctrl-C end a training after the running step, on all ranks together, instead of in the middle of it."""

import multiprocessing
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


class Forward:
    """In the process that started several ranks: hands SIGTERM and Ctrl-C on to them and waits for their end.

    Attributes:
        signum: the first signal; 0 for none.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> "Forward":
        self._before = {number: signal.signal(number, self._hand_on) for number in DEFAULTS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.signum = self.signum or number
        children = multiprocessing.active_children()
        if not children:
            raise SystemExit(128 + number)
        # A terminal or a service manager signals the ranks too, and the same signal twice would end them at once: they
        # get the other one, which counts where it is the first and is passed over where it is not.
        other = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM
        for child in children:
            os.kill(child.pid, other)
