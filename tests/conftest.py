"""Shared by all tests: thread limits, real data, run folders, and subprocesses as a user would start them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small models, and some tests start several ranks

import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script's `make test &` has it, and its children too
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT_LOGGER = logging.root

RunPython = Callable[..., subprocess.CompletedProcess[str]]
"""The type of `run_python`, for annotations of tests."""


def run_python_in(
    args: Sequence[str | Path],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    python: str | Path = sys.executable,
    timeout: float = 600,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs `python args...` and returns it with `stdout` and `stderr` as text.

    Args:
        args: what comes after the interpreter, such as `["-m", "sam2_lora_ext.train", "--help"]`.
        cwd: the folder to run in.
        env: added to this process's environment.
        python: the interpreter; this one by default.
        timeout: in seconds; longer is a failure.
        check: fail with the end of the output when the exit code is not 0.
    """
    command = [str(python), *map(str, args)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if check and done.returncode:
        pytest.fail(f"{command} exited {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}", pytrace=False)
    return done


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Undoes what a Trainer in this process does to logging, in which `caplog` finds records: it replaces the root."""
    restore_logging()
    yield
    restore_logging()


def restore_logging() -> None:
    """The root logger of Python, and this package's loggers below it."""
    logging.root = ROOT_LOGGER
    ours = logging.getLogger("sam2_lora_ext")
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """`run_python(args, cwd=, env=, python=, timeout=, check=)`: see `run_python_in`."""
    return run_python_in


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real steel images, never part of the repository; without it: skipped, or a failure in CI."""
    folder = Path(os.environ.get("SAM2_LORA_REAL_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / "severstal" / "train.csv").is_file():
        missing = f"no real images in {folder} (environment variable SAM2_LORA_REAL_DATA)"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return folder


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """Small inputs that once went wrong, never part of the repository; without them: skipped, or a failure in CI."""
    folder = Path(os.environ.get("SAM2_LORA_CASES") or REPOSITORY.parent / "shared" / "cases")
    if not (folder / "README.md").is_file():
        missing = f"no cases in {folder} (environment variable SAM2_LORA_CASES)"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return folder


@pytest.fixture(scope="session")
def nano_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised small SAM 2, where the quality of the base does not matter."""
    from helpers.small_runs import make_base

    return make_base(tmp_path_factory.mktemp("base") / "nano.pt")


@pytest.fixture(scope="session")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve synthetic strips in Kaggle's layout, with split.csv; not to be changed."""
    from helpers.small_runs import make_strips

    return make_strips(tmp_path_factory.mktemp("strips"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """An empty folder for one training run, in a path with a space."""
    folder = tmp_path / "a run"
    folder.mkdir()
    return folder


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A folder with the gradient logger of `ranks.py`."""
    from helpers.ranks import RECORDER

    folder = tmp_path / "recorder"
    folder.mkdir()
    (folder / "recorder.py").write_text(RECORDER)
    return folder


@pytest.fixture(scope="session")
def project_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from, so that building leaves nothing in the checkout."""
    target = tmp_path_factory.mktemp("project") / "sam2 lora"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("sam2_lora_ext", "hydra_plugins", "configs"):
        shutil.copytree(REPOSITORY / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (REPOSITORY / name).is_file():
            shutil.copy2(REPOSITORY / name, target)
    return target
