"""Every command and every piece of Python in the README's blocks, in its order, on the small model and a few synthetic
strips."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.small_runs import environment, make_strips, write_config
from sam2_lora_ext.host.configs import USER_CONFIG_DIR

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
ELSEWHERE = {  # what other tests run, to the letter or as a user would
    "git clone": "any clone",
    "make demo": "test_demo.py",
    "make test": "this",
    "pip install": "test_install.py",
    "cd sam2 &&": "test_install.py",
    "--use-cluster": "test_slurm.py",
    "make quality": "the benchmark itself",
}
SMALL = [  # (what the README says, what is run here)
    ("configs/sam2.1/sam2.1_hiera_l.yaml", "configs/sam2_nano.yaml"),
    ("-c configs/severstal_lora.yaml", "-c quick.yaml"),
    ("-c severstal_lora_video", "-c quick.yaml"),
    ("-c severstal_lora ", "-c quick.yaml "),
    ("--device cuda", "--device cpu"),
    ("--num-gpus 4", "--num-gpus 1"),
    ("/models/", "checkpoints/"),
    ("--grid lora.rank=4,8,16", "scratch.steps=2 --grid lora.rank=2,4"),
    ("S = 1024", "S = 128"),
    ('"steel.pt")', '"steel.pt", device="cpu")'),
]
PRELUDE = """
import numpy as np, onnxruntime, torch
from PIL import Image
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor
strip = Image.open("strip.jpg").convert("RGB")
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    """One line each, without comments and exports."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*|^#.*", "", line).strip() for line in text.splitlines()]
    return [re.sub(r"\s+", " ", line) for line in lines if line and not line.startswith("export ")]


def small(text: str) -> str:
    text = re.sub(r"-c severstal_lora$", "-c quick.yaml", text)
    for said, run in SMALL:
        text = text.replace(said, run)
    return text


def test_the_readme_has_commands_and_names_files_that_exist(repository):
    assert len(commands()) > 15 and len(blocks("python")) >= 2
    for name in set(re.findall(r"\b(?:tools|configs|benchmarks|docs|assets)/[\w./+-]*\w", README)):
        known = (repository / name).exists() or name.startswith("configs/sam2.1/")
        assert known, f"README names {name}, which does not exist"


def make_marks(folder: Path) -> None:
    """A strip and its label image of 0 and 255."""
    for name, value in (("images", 90), ("labels", 0)):
        (folder / name).mkdir(parents=True)
        pixels = np.full((64, 64), value, np.uint8)
        pixels[20:30, 20:40] = 255
        Image.fromarray(pixels).save(folder / name / "a.png")


@pytest.fixture(scope="module")
def desk(tmp_path_factory, repository) -> tuple[Path, dict[str, str]]:
    """A folder as a user of the README has it, and its environment."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "checkpoints").mkdir()
    base = folder / "checkpoints/sam2.1_hiera_large.pt"
    shutil.copy(repository / "assets/sam2_nano.pt", base)
    shutil.copy(base, folder / "base.pt")
    strips = make_strips(folder / "severstal", 12)
    (strips / "split.csv").unlink()
    shutil.copy(next((strips / "train_images").iterdir()), folder / "strip.jpg")
    make_marks(folder / "data/marks")
    for name in ("tools", "benchmarks", "configs"):
        (folder / name).symlink_to(repository / name)
    config = write_config(folder / "config", ["launcher.experiment_log_dir=runs/severstal_lora"])
    env = environment(base, strips, folder / "runs/severstal_lora")
    return folder, {
        **os.environ,
        **env,
        "SAM2_CHECKPOINTS": str(base.parent),
        USER_CONFIG_DIR: str(config.parent),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.mark.slow
def test_every_command_works(desk):
    folder, env = desk
    for command in commands():
        if any(word in command for word in ELSEWHERE):
            continue
        assert re.match(r"python (-m|tools/)", command), f"say where {command!r} is run, or run it"
        if "line_1 line_2" in command:
            for line, run in (("line_1", "severstal_lora"), ("line_2", "r16")):
                shutil.copytree(folder / "runs" / run / "adapters/final", folder / line)
        done = subprocess.run(
            small(command), shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{small(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    for code in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + small(code)], cwd=folder, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"
    assert (folder / "steel.pt").exists() and (folder / "onnx/image_encoder.onnx").exists()
