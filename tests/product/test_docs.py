"""README and docs/: every link leads somewhere, every command and piece of Python works, the site builds offline."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.doc_pages import ELSEWHERE, PAGES, PRELUDE, README, ROOT, blocks, commands, every_page, links, small
from helpers.small_runs import environment, make_strips, write_config
from sam2_lora_ext.host.configs import USER_CONFIG_DIR


@every_page
def test_links_and_named_files_exist(page):
    for target in links(page):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
    for name in set(re.findall(r"\b(?:tools|configs|benchmarks|docs|assets)/[\w./+-]*\w", page.read_text())):
        known = (ROOT / name).exists() or name.startswith("configs/sam2.1/")
        assert known, f"{page.name} names {name}, which does not exist"


@every_page
def test_lines_have_at_most_120_characters(page):
    """Tables aside, and what a config's line must hold."""
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "trainer."))] == []


def test_every_picture_can_be_shown():
    for picture in (ROOT / "docs").glob("*.svg"):
        ElementTree.parse(picture)
    for picture in (ROOT / "docs").glob("*.png"):
        Image.open(picture).verify()


def test_every_page_is_in_the_menu():
    menu = re.findall(r"^  - .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(menu) == sorted(page.name for page in PAGES if page != README)


def test_the_site_builds_strictly_and_needs_no_network(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs-material is not installed: make docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in PAGES if page != README} <= {page.stem for page in pages}
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?:[^\" >]+)", page.read_text())
        assert not loaded, f"{page.name} loads {loaded}"
    results = (tmp_path / "site/results.html").read_text()
    assert "What a training step costs" in results and "--8&lt;--" not in results


def make_marks(folder: Path) -> None:
    """A strip and its label image of 0 and 255."""
    for name, value in (("images", 90), ("labels", 0)):
        (folder / name).mkdir(parents=True)
        pixels = np.full((64, 64), value, np.uint8)
        pixels[20:30, 20:40] = 255
        Image.fromarray(pixels).save(folder / name / "a.png")


class Desk:
    """A folder as a user of the README has it, the environment, and the commands that were run there."""

    def __init__(self, folder: Path):
        (folder / "checkpoints").mkdir()
        base = folder / "checkpoints/sam2.1_hiera_large.pt"
        shutil.copy(ROOT / "assets/sam2_nano.pt", base)
        shutil.copy(base, folder / "base.pt")
        strips = make_strips(folder / "severstal", 12)
        (strips / "split.csv").unlink()
        shutil.copy(next((strips / "train_images").iterdir()), folder / "strip.jpg")
        make_marks(folder / "data/marks")
        for name in ("tools", "benchmarks", "configs"):
            (folder / name).symlink_to(ROOT / name)
        classes = "launcher.experiment_log_dir=runs/severstal_lora_classes"
        classes = write_config(folder / "config", [classes], "configs/demo_classes.yaml")
        classes.rename(folder / "config/quick_classes.yaml")
        config = write_config(folder / "config", ["launcher.experiment_log_dir=runs/severstal_lora"])
        self.folder, self.done = folder, set()
        self.env = {
            **os.environ,
            **environment(base, strips, folder / "runs/severstal_lora"),
            "SAM2_CHECKPOINTS": str(base.parent),
            USER_CONFIG_DIR: str(config.parent),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def follow(self, page: Path) -> None:
        """Runs the commands and the Python of a page, each once for all pages."""
        for command in commands(page):
            if command in self.done or any(word in command for word in ELSEWHERE):
                continue
            assert re.match(r"python (-m|tools/)", command), f"say where {command!r} is run, or run it"
            self.run(["bash", "-c", small(command)])
            self.done.add(command)
            for run, line in (("severstal_lora", "line_1"), ("r16", "line_2")):  # adapters of two lines, for deploy.md
                if (adapter := self.folder / "runs" / run / "adapters/final").is_dir():
                    shutil.copytree(adapter, self.folder / line, dirs_exist_ok=True)
        for code in blocks(page, "python"):
            if code not in self.done:
                self.run([sys.executable, "-c", PRELUDE + small(code)])
                self.done.add(code)

    def run(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    """After the README and the page on training, whose runs the other pages use."""
    desk = Desk(tmp_path_factory.mktemp("desk"))
    desk.follow(README)
    desk.follow(ROOT / "docs/training.md")
    return desk


@pytest.mark.slow
def test_the_readmes_commands_work(tmp_path):
    Desk(tmp_path).follow(README)


@pytest.mark.docs
@every_page
def test_every_command_works(desk, page):
    desk.follow(page)


@pytest.mark.docs
def test_what_the_pages_make_is_there(desk):
    desk.follow(ROOT / "docs/deploy.md")
    for name in ("sam2.1_steel.pt", "steel.pt", "both.pt", "onnx/image_encoder.onnx"):
        assert (desk.folder / name).exists()
