"""The start and the end of a command line: Ctrl-C from its first line on, and exit codes with one sentence.

Command lines import this file first, so it imports nothing slow.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sam2_lora_ext.utils.errors import find_user_error, system_sentence

LONGEST = 20_000  # characters of a message: a list of problems may be long, a hostile value endless


def catch_interrupts() -> None:
    """Makes Ctrl-C end the program with one sentence and exit code 130.

    A command line calls this in its first lines when it is run as a program, since its imports take seconds. Libraries
    turn an interrupt during their import into other errors, so until `run_cli`, and in later imports, the signal itself
    ends the process; Python would only print an interrupt in a finaliser.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored, as with nohup
        signal.signal(signal.SIGINT, _stop)
    usual, unraisable = sys.excepthook, sys.unraisablehook

    def on_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        _stop() if _interrupted(error) else usual(kind, error, trace)

    def on_unraisable(found: Any) -> None:
        _stop() if _interrupted(found.exc_value) else unraisable(found)

    sys.excepthook, sys.unraisablehook = on_exception, on_unraisable


def _stop(*_: Any) -> NoReturn:
    os.write(2, b"stopped by Ctrl-C\n")  # print is not reentrant in a signal handler
    os._exit(130)


def interrupt(signum: int, frame: Any) -> None:
    """Raises `KeyboardInterrupt`, except inside an import, where libraries would turn it into another error."""
    above = frame
    while above is not None:
        if above.f_code.co_filename == "<frozen importlib._bootstrap>":
            _stop()
        above = above.f_back
    signal.default_int_handler(signum, frame)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def run_cli(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line and exits: 0 (or what `main` returns), 130 on Ctrl-C, 2 with one sentence on a mistake.

    A mistake is a `UserError`, or a file that the system refuses.
    """
    try:
        if signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGINT, interrupt)  # commands import most of what they need when they run
        sys.exit(main(argv) or 0)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if _interrupted(error):
            print("stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)
        mistake = find_user_error(error) or system_sentence(error)
        if mistake is None:
            raise
        said = str(mistake)
        print(f"error: {said if len(said) <= LONGEST else f'{said[:LONGEST]}...'}", file=sys.stderr)
        sys.exit(2)
