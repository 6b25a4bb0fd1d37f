"""For the doctor's tests: a sound training, and the findings after something was planted in it."""

from pathlib import Path

import pytest

from helpers.small_runs import QUICK
from helpers.small_runs import environment as demo_environment
from sam2_lora_ext.doctor.examine import examine
from sam2_lora_ext.doctor.findings import Finding


@pytest.fixture
def place(nano_base: Path, strips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a sound training; the folder of the run, which does not exist yet."""
    for name, value in demo_environment(nano_base, strips, tmp_path / "run").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "run"


def find(*overrides: str, level: str = "red", step: bool = False, config: str = "demo") -> list[Finding]:
    """The findings of a level for the quick demo, or another config, with overrides."""
    return [finding for finding in examine(config, [*QUICK, *overrides], step=step) if finding.level == level]


def only(findings: list[Finding], *words: str) -> Finding:
    """The one finding; it has the words, and advice or a sentence that is advice."""
    assert len(findings) == 1, findings
    for word in words:
        assert word in findings[0].text + " " + findings[0].advice
    return findings[0]
