"""README and the pages of docs/: their command blocks, and what is run of them here, on the small model."""

import re
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "mkdocs.yml").is_file())
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {  # what other tests run, to the letter or as a user would
    "git clone": "any clone",
    "make demo": "test_demo.py",
    "make test": "this",
    "pip install": "test_install.py",
    "cd sam2 &&": "test_install.py",
    "--use-cluster": "test_slurm.py",
    "tools/serve.py": "test_serve_tool.py",  # it serves until Ctrl-C
}
SMALL = [  # (what a page says, what is run here)
    ("configs/sam2.1/sam2.1_hiera_l.yaml", "configs/sam2_nano.yaml"),
    ("-c configs/severstal_lora.yaml", "-c quick.yaml"),
    ("-c configs/severstal_lora_classes.yaml", "-c quick_classes.yaml"),
    (" strips/ ", " severstal/train_images "),
    ("-c severstal_lora_video", "-c quick.yaml"),
    ("-c severstal_lora ", "-c quick.yaml "),
    ("--device cuda", "--device cpu"),
    ("--num-gpus 4", "--num-gpus 1"),
    ("/models/", "checkpoints/"),
    ("--grid lora.rank=4,8,16", "scratch.steps=2 --grid lora.rank=2,4"),
    ("S = 1024", "S = 128"),
    ('steel.pt")', 'steel.pt", device="cpu")'),
    ("hydra_overrides_extra=[size], ", 'hydra_overrides_extra=[size], device="cpu", '),
    ("apply_postprocessing=False)", 'apply_postprocessing=False, device="cpu")'),
    ("predictor = SAM2ImagePredictor(model)", "predictor = fit_predictor(SAM2ImagePredictor(model))"),  # not 1024 px
]
PRELUDE = """
import numpy as np, onnxruntime, torch
from PIL import Image
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor
from sam2_lora_ext import fit_predictor
strip = Image.open("strip.jpg").convert("RGB")
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def commands(page: Path) -> list[str]:
    """One line each, without comments and exports, in the page's order."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*|^#.*", "", line).strip() for line in text.splitlines()]
    return [re.sub(r"\s+", " ", line) for line in lines if line and not line.startswith("export ")]


def small(text: str) -> str:
    text = re.sub(r"-c severstal_lora$", "-c quick.yaml", text)
    for said, run in SMALL:
        text = text.replace(said, run)
    return text


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures that are no addresses, without their anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target.split("#")[0] for target in found if not target.startswith(("http", "#"))]


def by_name(path: object) -> str:
    return path.name if isinstance(path, Path) else str(path)


every_page = pytest.mark.parametrize("page", PAGES, ids=by_name)
