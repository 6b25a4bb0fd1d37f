"""Every tool's command line: numbers have ranges, and Ctrl-C ends with one sentence, also during imports."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = {  # with arguments that make it import what it needs
    "tools/ablate.py": ["-c", "demo", "--grid", "lora.rank=4", "--out", "OUT"],
    "tools/demo.py": ["--out", "OUT", "--strips", "5"],
    "tools/doctor.py": ["-c", "demo"],
    "tools/evaluate.py": ["--checkpoint", "OUT/none.pt", "--data", "OUT/none", "--out", "OUT/evaluation"],
    "tools/evaluate_inspection.py": ["--checkpoint", "OUT/none.pt", "--data", "OUT/none", "--out", "OUT/inspection"],
    "tools/export_adapter.py": ["OUT/none", "OUT/adapter"],
    "tools/export_onnx.py": ["--config", "configs/sam2_nano.yaml", "--checkpoint", "OUT/none.pt", "--out", "OUT/onnx"],
    "tools/fit_decision.py": ["--checkpoint", "OUT/none.pt", "--data", "OUT/none"],
    "tools/inspect_strips.py": ["--checkpoint", "OUT/none.pt", "OUT/none", "--out", "OUT/inspected"],
    "tools/make_demo_base.py": ["--out", "OUT/base.pt", "--work", "OUT"],
    "tools/merge_lora.py": ["--base", "OUT/none.pt", "--adapter", "OUT/none", "--out", "OUT/merged.pt"],
    "tools/prepare_data.py": ["split", "OUT/none", "--out", "OUT/split.csv"],
    "tools/report.py": ["OUT/none"],
    "tools/serve.py": ["--checkpoint", "OUT/none.pt", "--port", "0"],
    "tools/track_strip.py": ["--checkpoint", "OUT/a", "--image", "OUT/a.png", "--click", "1,1", "--out", "OUT/b.png"],
    "tools/unmerge_lora.py": ["--base", "OUT/a.pt", "--merged", "OUT/b.pt", "--out", "OUT/adapter"],
    "-m sam2_lora_ext.train": ["-c", "demo", "launcher.experiment_log_dir=OUT/run"],
    "-m benchmarks.train_step": ["--out", "OUT/step.json"],
    "-m benchmarks.quality": ["--out", "OUT/quality", "--data", "OUT/none"],
}
# Strikes a delay after the program's own first lines, for what the interpreter does before is not ours to catch.
STRIKE = """\
import os, runpy, signal, sys, threading, time
def strike(usual=sys.excepthook, delay=float(sys.argv.pop(1))):
    while sys.excepthook is usual:
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=strike, daemon=True).start()
name = sys.argv.pop(1)
sys.argv[0] = name.removeprefix("-m ")
sys.path[0] = os.getcwd()
if name.startswith("-m "):
    runpy.run_module(name[3:], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(name, run_name="__main__")
"""


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.6])
@pytest.mark.parametrize("name", RUN)
def test_ctrl_c_is_a_sentence_from_the_first_line_on(name, delay, tmp_path):
    """While it imports, or just after: 130 and one sentence; it may have ended before with a sentence of its own."""
    arguments = [argument.replace("OUT", str(tmp_path)) for argument in RUN[name]]
    done = subprocess.run(
        [sys.executable, "-c", STRIKE, str(delay), name, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    if done.returncode == 130:
        assert "stopped by Ctrl-C" in done.stderr or "SIGINT" in done.stderr
    else:
        assert delay > 0.1 and done.returncode in (1, 2), (done.returncode, done.stderr)


@pytest.mark.parametrize(
    "path",
    [
        path.relative_to(ROOT).as_posix()
        for path in sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")])
        if "run_cli(main)" in path.read_text()
    ],
)
def test_every_command_line_catches_ctrl_c_before_its_imports(path):
    before, _, after = (ROOT / path).read_text().partition("    catch_interrupts()")
    imported = set(re.findall(r"^(?:import|from) (\S+)", before, re.MULTILINE))
    assert after and imported <= {"os", "sys", "sam2_lora_ext.utils.command_line", "sam2_lora_ext.utils.errors"}


@pytest.mark.parametrize("path", [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("tools/*.py"))])
def test_every_number_has_a_range(path):
    """argparse's own int and float take negative numbers, nan and what no machine has."""
    assert not re.search(r"type=(int|float)\b", (ROOT / path).read_text())


@pytest.mark.parametrize(
    ("tool", "option", "values"),
    [
        ("merge_lora", "--alpha", ["nan", "inf", "-1", "0", "1e400", "two"]),
        ("merge_lora", "--weights", ["nan", "-inf", "1e300"]),
        ("export_adapter", "--alpha", ["nan", "0", "-3"]),
        ("unmerge_lora", "--rank", ["0", "-1", "1.5", "nan", "9" * 5000]),
        ("unmerge_lora", "--bound", ["nan", "-0.1", "2"]),
        ("export_onnx", "--image-size", ["0", "-32", "100", "32000", "1e3"]),
        ("ablate", "--num-gpus", ["0", "-1", "99999"]),
        ("ablate", "--hours", ["0", "nan"]),
        ("ablate", "--cpus", ["0"]),
        ("ablate", "--parallel", ["-5"]),
        ("evaluate", "--min-area", ["0", "-1", "nan"]),
        ("evaluate", "--image-size", ["100", "0"]),
        ("serve", "--port", ["-1", "65536", "x"]),
        ("serve", "--crop", ["0"]),
        ("track_strip", "--width", ["0", "x"]),
        ("demo", "--strips", ["0", "4", "1e9"]),
        ("demo", "--seed", ["-1", "99999999999"]),
        ("make_demo_base", "--lr", ["nan", "0", "-1"]),
        ("make_demo_base", "--batch", ["0"]),
        ("make_demo_base", "--threads", ["0", "1000000"]),
    ],
)
def test_a_number_out_of_its_range_is_a_sentence(tool, option, values, tmp_path, monkeypatch, capsys):
    """Before anything is read or written, with exit code 2."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    main = __import__(tool).main
    others = [argument.replace("OUT", str(tmp_path)) for argument in RUN[f"tools/{tool}.py"]]
    for value in values:
        with pytest.raises(SystemExit) as stopped:
            main([*others, f"{option}={value}"])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and f"argument {option}: must be a" in said and len(said) < 400
    assert not any(tmp_path.iterdir())


def test_ctrl_c_inside_a_later_import_ends_the_program_too(tmp_path):
    """A library that catches everything while it is imported; the command imports it when it runs."""
    (tmp_path / "greedy.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\nexcept BaseException:\n    pass\n"
    )
    script = (
        "from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli\n"
        "catch_interrupts()\n"
        "def main(argv):\n    import greedy\n    print('went on')\n"
        "run_cli(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by Ctrl-C\n")
