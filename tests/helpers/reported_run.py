"""A run with its evaluation, and its report."""

from pathlib import Path

import evaluate
import pytest
import report as tool

from helpers.small_runs import environment as demo_environment
from helpers.small_runs import launch, write_config


@pytest.fixture(scope="module")
def run(nano_base: Path, strips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps by SAM 2's own launcher, with its evaluation."""
    folder = tmp_path_factory.mktemp("reported") / "a run"
    config = write_config(tmp_path_factory.mktemp("config"))
    process = launch(config, demo_environment(nano_base, strips, folder))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    how = ["--max-clicks", "1", "--pictures", "1", "--out", str(folder / "evaluation")]
    evaluate.main(["--compare", f"base={nano_base}", f"lora={folder}", *how])
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    tool.main([str(run)])
    return (run / "report.html").read_text()
