"""`sam2-lora`: one name for all commands, whose help needs no torch, and their completion."""

import subprocess
import sys

import pytest

from sam2_lora_ext.commands import cli

HEAVY = ("torch", "numpy", "sam2", "hydra")
PROBE = """\
import sys
from sam2_lora_ext.commands.cli import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help_answers_without_heavy_imports(name, repository):
    words = ["--help"] if name is None else [name, "--help"]
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *words], capture_output=True, text=True, cwd=repository
    )
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
    assert done.stdout.startswith("usage: ") and (name is None or f"{name}" in done.stdout)


def test_a_command_is_what_the_tool_of_its_name_runs(tmp_path, capsys):
    cli.main(["data", "synth", "--out", str(tmp_path / "strips"), "--count", "2", "--quiet"])
    assert capsys.readouterr().out == f"2 strips written to {tmp_path / 'strips'}\n"


def test_an_unknown_command_is_a_sentence(repository):
    done = subprocess.run(
        [sys.executable, "-m", "sam2_lora_ext.commands.cli", "mrge"], capture_output=True, text=True, cwd=repository
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no command 'mrge': choose from train, doctor, data")


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_knows_commands_and_options(shell):
    script = cli.completion(shell)
    assert all(word in script for word in ("export-onnx", "unmerge", "verify", "resume-with-changes"))
