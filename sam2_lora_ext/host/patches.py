"""What `LoRATrainer` changes around the stock Trainer: two fixes, a shared log, and one sentence for a user's mistake.

The fixes are active only while it runs: without CUDA stock's first step fails in `MemMeter`, and it logs the entire
environment, including secrets.
"""

import errno
import logging
import os
import re
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import training.trainer as host
from training.utils.train_utils import MemMeter

from sam2_lora_ext.utils.errors import find_user_error

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|_PWD|CREDENTIAL|AUTH|COOKIE|SESSION|DSN|PRIVATE", re.IGNORECASE)
REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
URL_PASSWORD = re.compile(r"(://(?:[^/@:\s]*:)?)[^/@\s]+@")


class HostMemMeter(MemMeter):
    """The Trainer's memory column on a CPU: the peak resident memory of the process in GB (10^9 bytes)."""

    def update(self, n: int = 1, reset_peak_usage: bool = True) -> None:
        self.val = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        self.sum += self.val * n
        self.count += n
        self.avg = self.sum / self.count
        self.peak = max(self.peak, self.val)


def log_redacted_environment() -> None:
    """Logs the environment as the stock Trainer does, without the values of variables that look like secrets."""
    lines = [f"{name}={redact(name, os.environ[name])}" for name in sorted(os.environ)]
    logging.info("Logging ENV_VARIABLES\n" + "\n".join(lines))


def redact(name: str, value: str) -> str:
    """A variable's value for the log: no secrets, which are recognised by the name, and no passwords in URLs."""
    return "<redacted>" if SECRET.search(name) else URL_PASSWORD.sub(r"\1<redacted>@", value)


@contextmanager
def host_guards(accelerator: str) -> Iterator[None]:
    """Replaces `log_env_variables`, and on a CPU `MemMeter`, in the Trainer's module within the block."""
    saved, raising = (host.MemMeter, host.log_env_variables), logging.raiseExceptions
    logging.raiseExceptions = False  # no traceback for a line that cannot be logged on a full disk
    host.log_env_variables = log_redacted_environment
    if accelerator == "cpu":
        host.MemMeter = HostMemMeter
    try:
        with warnings.catch_warnings():
            # The Trainer uses the deprecated name of CUDA's autocast at every step; on a CPU it does nothing and warns.
            warnings.filterwarnings(
                "ignore", message=r".*torch\.cuda\.amp\.autocast.*deprecated", category=FutureWarning
            )
            warnings.filterwarnings("ignore", message=".*CUDA is not available.*", category=UserWarning)
            yield
    finally:
        (host.MemMeter, host.log_env_variables), logging.raiseExceptions = saved, raising


def share_log() -> None:
    """Makes this package's loggers write to the Trainer's log, after the Trainer has configured logging."""
    ours = logging.getLogger("sam2_lora_ext")
    ours.handlers, ours.propagate = logging.root.handlers, False
    ours.setLevel(logging.INFO)


@contextmanager
def at_work(accelerator: str) -> Iterator[None]:
    """Applies the patches; ends the process with one sentence on a user's mistake, or on Ctrl-C.

    The stock launcher catches no errors: users would see a traceback through Hydra.
    """
    with host_guards(accelerator):
        try:
            yield
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
            raise SystemExit(130) from None
        except Exception as error:
            sentence = find_user_error(error) or system_refusal(error)
            if sentence is None:
                raise
            logging.error(str(sentence))
            rank = int(os.environ.get("RANK", "0"))  # most mistakes occur on all ranks, but some on one
            print(f"error: {f'rank {rank}: ' if rank else ''}{sentence}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None


def system_refusal(error: BaseException) -> str | None:
    """A sentence for a disk or permission error anywhere in SAM 2's code; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in REFUSALS:
        return None
    return (
        f"cannot write {error.filename or 'the run'}: {error.strerror}; check the folder, its permissions and the free "
        "disk space"
    )
