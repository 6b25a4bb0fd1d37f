"""Random damage to the readers' files: only this project's own error may be raised, and no reader may hang.

`make fuzz` runs this for longer: the environment variable SAM2_LORA_FUZZ_SECONDS is the time for each reader.
"""

import contextlib
import os
import time

import pytest
from hypothesis import HealthCheck, given, seed, settings

from helpers.fuzz_targets import TARGETS
from sam2_lora_ext.utils.errors import UserError

SECONDS = float(os.environ.get("SAM2_LORA_FUZZ_SECONDS", "0"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_only_our_own_error_comes_out(target, tmp_path):
    reader = target(tmp_path)
    count = 0

    def once(content: bytes) -> None:
        nonlocal count
        count += 1
        began = time.process_time()  # a busy disk is nobody's mistake
        with contextlib.suppress(UserError):
            reader.read(content)
        assert time.process_time() - began < 20, "it takes too long"

    cases = reader.cases()
    deadline, turn = time.monotonic() + SECONDS, 0
    while turn == 0 or time.monotonic() < deadline:
        examples = settings(
            max_examples=200 if SECONDS else 40,
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
        )
        seed(turn)(examples(given(cases)(once)))()
        turn += 1
    assert count >= 30
    print(f"{target.__name__}: {count} inputs")
