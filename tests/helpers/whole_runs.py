"""The run of the small model that is never stopped."""

from pathlib import Path

import pytest

from helpers.kills import Killed, assert_same_run, at_step, ends_with, kill_at  # noqa: F401  # noqa: F401
from helpers.small_runs import environment, train_here


@pytest.fixture(scope="module")
def whole(tmp_path_factory, nano_base, strips) -> Path:
    """The run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_here(environment(nano_base, strips, folder))
    return folder
