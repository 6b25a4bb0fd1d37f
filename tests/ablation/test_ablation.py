"""The ablation tool: its grid, its table, and (slow) real members that finish, fail and resume."""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ablate
import numpy as np
import pytest
from PIL import Image

from helpers.small_runs import QUICK, environment
from sam2_lora_ext.ablation.grid import Member, best_of, collect, members_of, parse_grid, plot, to_csv, to_markdown
from sam2_lora_ext.commands.ablate import check_metric
from sam2_lora_ext.utils.errors import UserError


def test_grid():
    axes = ["lora.rank=4,8", "lora.targets=[a,'b,c'],[d]", "+x.y={p: 1, q: 2},null"]
    assert parse_grid(axes) == {
        "lora.rank": ["4", "8"],
        "lora.targets": ["[a,'b,c']", "[d]"],
        "+x.y": ["{p: 1, q: 2}", "null"],
    }


@pytest.mark.parametrize("axis", ["rank", "=4", "a b=4", "rank=", "rank=4,,8", "rank=4,4"])
def test_wrong_axes(axis):
    with pytest.raises(UserError, match="--grid"):
        parse_grid([axis])


def test_members_have_folders_of_their_own(tmp_path):
    grid = parse_grid(["lora.rank=4,8", "lora.targets=[" + "x" * 100 + "],[" + "x" * 100 + ",y]"])
    members = members_of(grid, tmp_path)
    assert len({member.folder for member in members}) == 4
    assert members[0].overrides == ["lora.rank=4", "lora.targets=[" + "x" * 100 + "]"]
    assert members == members_of(grid, tmp_path)


def test_a_members_folder_does_not_depend_on_the_others(tmp_path):
    long = "[" + "x" * 100
    few = members_of(parse_grid([f"lora.targets={long},y]", "a.b=[c,d],c-d"]), tmp_path)
    more = members_of(parse_grid([f"lora.targets=[e],{long},y]", "a.b=c,[c,d],c-d"]), tmp_path)
    assert {member.folder for member in few} < {member.folder for member in more}
    assert len({member.folder for member in more}) == 6


def test_an_unknown_metric_is_a_sentence_with_the_choices(tmp_path, monkeypatch):
    """Before any member runs; a metric that only the grid adds is known; the monitored metric decides by its mode."""
    monkeypatch.setenv("SAM2_LORA_CONFIG_DIR", "")
    command = ["-c", "demo", "--out", str(tmp_path / "out"), "--grid", "lora.rank=2"]
    with pytest.raises(UserError, match="--metric iou: .*choose from iou_1click.*clean_accuracy.*loss_mask"):
        ablate.main([*command, "--metric", "iou"])
    assert not (tmp_path / "out").exists()

    def mode(metric: str | None, *overrides: str, grid: tuple[str, ...] = ("lora.rank=2",)) -> tuple[str, str]:
        args = argparse.Namespace(config="demo", overrides=list(overrides), metric=metric)
        found = check_metric(args, parse_grid(grid))
        return args.metric, found

    assert mode(None) == ("iou_1click", "max") and mode("loss") == ("loss", "min")
    assert mode(None, "trainer.monitor=loss_dice", "trainer.monitor_mode=min") == ("loss_dice", "min")
    boxes = "+trainer.meters.val.severstal.segmentation.prompt=click,box"
    assert mode("iou_box", grid=(boxes,)) == ("iou_box", "max")
    with pytest.raises(UserError, match="iou_box"):
        mode("iou_box")


MEMBER_PROGRAM = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from sam2_lora_ext.run.signals import Interrupt
with Interrupt() as interrupt:
    Path(sys.argv[1], "started").touch()
    for _ in range(1200):
        if interrupt.signum:
            time.sleep(1)  # the step
            Path(sys.argv[1], "finished").touch()
            sys.exit(128 + interrupt.signum)
        time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_member_finish_its_step(number, tmp_path, repository):
    """As a terminal sends it, to the process group, and to the tool alone; no member keeps running."""
    start = f"import sys; sys.path.insert(0, {str(repository)!r}); from pathlib import Path; "
    start += "from sam2_lora_ext.ablation.jobs import attend, Task; "
    start += f"attend(Task([sys.executable, '-c', {MEMBER_PROGRAM!r}, {str(tmp_path)!r}, "
    start += f"{str(repository)!r}], Path({str(tmp_path)!r})))"
    process = subprocess.Popen([sys.executable, "-c", start], stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said = process.communicate(timeout=60)[1].decode()
    assert (tmp_path / "finished").exists(), said
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 143), said


def finish(member: Member, iou: float, trained: int) -> None:
    member.folder.mkdir()
    (member.folder / "training_summary.json").write_text(
        json.dumps(
            {
                "parameters": {"trained": trained, "total": 100},
                "steps": 10,
                "wall_seconds": 1.5,
                "monitor": "iou_1click",
                "best": {"epoch": 0, "step": 5, "metrics": {"iou_1click": iou, "dice_1click": 0.5}},
            }
        )
    )


def test_results(tmp_path):
    members = members_of(parse_grid(["lora.rank=4,8,16,32"]), tmp_path)
    finish(members[0], 0.7, 40)
    finish(members[1], 0.7, 80)
    finish(members[2], 0.6, 160)
    rows = collect(members, {members[3].folder.name: "no such rank"})
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["failed"] and rows[3]["reason"] == "no such rank"
    assert best_of(rows, "iou_1click") is rows[0]  # the smaller of equal ones
    read = list(csv.DictReader(to_csv(rows).splitlines()))
    assert [row["lora.rank"] for row in read] == ["4", "8", "16", "32"] and read[2]["iou_1click"] == "0.6"
    assert best_of(rows, "iou_1click", "min") is rows[2]
    assert collect(members, {}, "dice_box")[0]["dice_box"] is None  # of a run that did not give it
    table = to_markdown(rows, "iou_1click")
    assert table.count("\n") == 6 and "**0.7000**" in table and "| 0.7000 |" in table
    assert "| 1 | 4 | finished |" in table.replace("**", "")  # numbered as in the plot
    plot(members, rows, "iou_1click", tmp_path / "plot.png")
    image = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB"))
    first, second, third, failed = ([31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40])  # C0 to C3
    assert all((image == colour).all(-1).any() for colour in (first, second, third))
    assert not (image == failed).all(-1).any()
    plot(members[3:], rows[3:], "iou_1click", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists() and best_of(rows[3:], "iou_1click") is None


@pytest.mark.slow
def test_real_members(tmp_path, nano_base, strips, repository: Path, run_python):
    """Two finish, one fails; the second start runs only that one again."""
    env = environment(nano_base, strips, tmp_path / "unused") | {"SLURM_CONF": ""}
    command = [
        repository / "tools/ablate.py",
        "-c",
        "demo",
        *QUICK,
        "scratch.steps=2",
        "--out",
        tmp_path / "out",
        "--grid",
        "lora.rank=2,0,4",
    ]
    done = run_python(command, env=env, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "lora.rank must be a whole number from 1 to 4096, got 0" in done.stderr + done.stdout
    assert "best     rank-" in done.stdout
    with open(tmp_path / "out/ablation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert int(rows[0]["params_trained"]) * 2 == int(rows[2]["params_trained"])
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("training_summary.json")}
    again = run_python(command, env=env, cwd=tmp_path)
    assert again.returncode == 1 and "3, 2 of them already finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (tmp_path / "out/ablation.png").exists() and "| rank |" in (
        tmp_path / "out/ablation.md"
    ).read_text().replace("lora.", "")
