"""The ablation tool: its grid, its table, and (slow) real members that finish, fail and resume."""

import csv
import json
from pathlib import Path

import pytest
from small_runs import QUICK, environment

from sam2_lora_ext.ablation import Member, best_of, collect, members_of, parse_grid, plot, to_csv, to_markdown
from sam2_lora_ext.errors import UserError


def test_grid():
    axes = ["lora.rank=4,8", "lora.targets=[a,'b,c'],[d]", "+x.y={p: 1, q: 2},null"]
    assert parse_grid(axes) == {
        "lora.rank": ["4", "8"], "lora.targets": ["[a,'b,c']", "[d]"], "+x.y": ["{p: 1, q: 2}", "null"],
    }  # fmt: skip


@pytest.mark.parametrize("axis", ["rank", "=4", "a b=4", "rank=", "rank=4,,8", "rank=4,4"])
def test_wrong_axes(axis):
    with pytest.raises(UserError, match="--grid"):
        parse_grid([axis])


def test_members_have_folders_of_their_own(tmp_path):
    grid = parse_grid(["lora.rank=4,8", "lora.targets=[" + "x" * 100 + "],[" + "x" * 100 + ",y]"])
    members = members_of(grid, tmp_path, ["-c", "demo"])
    assert len({member.folder for member in members}) == 4
    assert members[0].overrides == ["lora.rank=4", "lora.targets=[" + "x" * 100 + "]"]
    assert members == members_of(grid, tmp_path, ["-c", "demo"])
    with pytest.raises(UserError, match="other settings"):
        members_of(grid, tmp_path, ["-c", "demo", "scratch.steps=2"])


def finish(member: Member, iou: float, trained: int) -> None:
    (member.folder / "training_summary.json").write_text(json.dumps({
        "parameters": {"trained": trained, "total": 100}, "steps": 10, "wall_seconds": 1.5, "monitor": "iou_1click",
        "best": {"epoch": 0, "step": 5, "metrics": {"iou_1click": iou, "dice_1click": 0.5}},
    }))  # fmt: skip


def test_results(tmp_path):
    members = members_of(parse_grid(["lora.rank=4,8,16,32"]), tmp_path, [])
    finish(members[0], 0.7, 40)
    finish(members[1], 0.7, 80)
    finish(members[2], 0.6, 160)
    rows = collect(members, {members[3].folder.name: "no such rank"})
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["failed"] and rows[3]["reason"] == "no such rank"
    assert best_of(rows, "iou_1click") is rows[0]  # the smaller of equal ones
    read = list(csv.DictReader(to_csv(rows).splitlines()))
    assert [row["lora.rank"] for row in read] == ["4", "8", "16", "32"] and read[2]["iou_1click"] == "0.6"
    table = to_markdown(rows, "iou_1click")
    assert table.count("\n") == 6 and "**0.7000**" in table and "| 0.7000 |" in table
    plot(rows, "iou_1click", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plot(rows[3:], "iou_1click", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists() and best_of(rows[3:], "iou_1click") is None


@pytest.mark.slow
def test_real_members(tmp_path, nano_base, strips, repository: Path, run_python):
    """Two finish, one fails; the second start runs only that one again."""
    env = environment(nano_base, strips, tmp_path / "unused") | {"SLURM_CONF": ""}
    command = [repository / "tools/ablate.py", "-c", "demo", *QUICK, "scratch.steps=2", "--out", tmp_path / "out",
               "--grid", "lora.rank=2,0,4"]  # fmt: skip
    done = run_python(command, env=env, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "lora.rank must be a whole number of at least 1, got 0" in done.stderr + done.stdout
    assert "best     rank-" in done.stdout
    with open(tmp_path / "out/ablation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert int(rows[0]["params_trained"]) * 2 == int(rows[2]["params_trained"])
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("training_summary.json")}
    again = run_python(command, env=env, cwd=tmp_path)
    assert again.returncode == 1 and "3, of which 2 are finished already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (tmp_path / "out/ablation.png").exists() and "| rank |" in (
        tmp_path / "out/ablation.md"
    ).read_text().replace("lora.", "")
