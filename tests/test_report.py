"""The report: from a real run and evaluation, self-contained, with commands that repeat the run."""

import json
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sam2_lora_ext.compose import compose, locate
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.evaluate.run import Protocol
from sam2_lora_ext.evaluate.tables import headline
from sam2_lora_ext.host import USER_CONFIG_DIR
from sam2_lora_ext.lora.adapter import Adapter, LayerAdapter
from sam2_lora_ext.report.adapter_stats import block_changes, block_of, layer_changes
from sam2_lora_ext.report.collect import read_evaluation, read_run
from sam2_lora_ext.report.commands import environment, training_command
from sam2_lora_ext.report.page import render
from small_runs import environment as demo_environment, launch, write_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import evaluate  # noqa: E402
import report as tool  # noqa: E402


@pytest.fixture(scope="module")
def run(nano_base: Path, strips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps by SAM 2's own launcher, with its evaluation."""
    folder = tmp_path_factory.mktemp("reported") / "a run"
    config = write_config(tmp_path_factory.mktemp("config"))
    process = launch(config, demo_environment(nano_base, strips, folder))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    evaluate.main(
        [
            "--compare",
            f"base={nano_base}",
            f"lora={folder}",
            "--data",
            str(strips),
            "--split-file",
            str(strips / "split.csv"),
            "--split",
            "val",
            "--crop",
            "256",
            "--max-clicks",
            "1",
            "--pictures",
            "1",
            "--out",
            str(folder / "evaluation"),
        ]
    )
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    tool.main([str(run)])
    return (run / "report.html").read_text()


class Reader(HTMLParser):
    """Notes what a page refers to, and that its elements are closed in order."""

    VOID = {"meta", "link", "img", "br", "use", "path"}

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def test_the_page_needs_nothing_else(page):
    reader = read(page)
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    assert not re.search(r"url\((?!#)|@import|<script", page)
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_it_has_every_section_and_number(page, run):
    text = read(page).text
    for heading in (
        "Run",
        "Curves",
        "Evaluation",
        "Differences from base",
        "By class",
        "Pictures",
        "Where the adaptation happened",
        "To repeat it",
    ):
        assert heading in text
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["name"] in text and f"{summary['parameters']['trained']:,}" in text
    record = json.loads((run / "evaluation/evaluation.json").read_text())
    for model in record["models"]:
        assert all(f"{model['metrics'][key]['mean']:.3f}" in text for key in headline(Protocol(**record["protocol"])))
    assert page.count("<img ") == sum(len(model["gallery"]) for model in record["models"]) > 0
    assert page.count("<svg") == 4 and page.count("image/jpeg") == page.count(
        "<img "
    )  # three curves, one chart of blocks


def test_plots_follow_the_page_s_colours(page):
    svg = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "currentColor" in svg and "#000000" not in svg.replace("fill: #000000", "") and "#010203" not in svg


def test_the_training_command_composes_the_same_config(run, monkeypatch):
    """Run through the shell's own rules and our composer, every value is as it was, but for the folder."""
    from omegaconf import OmegaConf

    words = shlex.split(training_command(read_run(run)))
    given = dict(word.split("=", 1) for word in words[: words.index("python")])
    assert {"SEVERSTAL_ROOT", "SEVERSTAL_SPLIT", "SAM2_LORA_NANO"} <= set(given) and "SAM2_LORA_DEMO_RUN" not in given
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert words[words.index("python") :][1:4] == ["-m", "sam2_lora_ext.train", "-c"]
    name, folder = locate(words[words.index("-c") + 1])
    monkeypatch.setenv(USER_CONFIG_DIR, str(folder))
    again = OmegaConf.to_yaml(compose(name, words[words.index("-c") + 2 :]), resolve=True)
    before = OmegaConf.to_yaml(OmegaConf.load(run / "config_resolved.yaml"))
    assert OmegaConf.create(again.replace(f"{run}_again", str(run))) == OmegaConf.create(before)


def test_commands_of_evaluation_and_merge_are_there(page, run):
    text = read(page).text
    assert "python tools/merge_lora.py --base" in text and "python tools/evaluate.py --compare" in text
    assert environment(read_run(run))["SEVERSTAL_ROOT"] in text


# ---- where the adaptation happened ----------------------------------------------------------------------------------


def test_norms_by_hand():
    layers = {
        "image_encoder.trunk.blocks.3.attn.qkv": LayerAdapter(
            torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), alpha=2.0
        ),
        "image_encoder.trunk.blocks.3.attn.proj": LayerAdapter(
            torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [0.0]]), alpha=1.0
        ),
        "sam_mask_decoder.transformer.layers.1.mlp.layers.0": LayerAdapter(
            torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [1.0]]), alpha=1.0
        ),
    }
    base = {f"{name}.weight": torch.full((2, 2), 5.0) for name in layers}  # norm 10
    changes = layer_changes(Adapter(layers), base)
    assert [change.norm for change in changes] == pytest.approx([10.0, 0.0, 2**0.5])
    assert [change.relative for change in changes] == pytest.approx([1.0, 0.0, 2**0.5 / 10])
    blocks = block_changes(Adapter(layers), base)
    assert [block.name for block in blocks] == ["encoder block 3", "decoder layer 1"]
    assert blocks[0].relative == pytest.approx(10 / 200**0.5)  # sqrt(100 + 0) / sqrt(100 + 100)
    assert [block.relative for block in block_changes(Adapter(layers), None)] == [None, None]


def test_block_names():
    assert (
        block_of("sam_mask_decoder.transformer.final_attn_token_to_image.q_proj") == "decoder final_attn_token_to_image"
    )
    assert block_of("memory_attention.layers.0.self_attn.q_proj") == "memory layer 0"


# ---- what is missing or damaged -------------------------------------------------------------------------------------


def test_a_run_that_just_began_has_a_report_too(run, tmp_path):
    young = tmp_path / "young"
    young.mkdir()
    for name in ("run.json", "lora.json"):
        shutil.copy(run / name, young)
    text = read(render([read_run(young)], [])).text
    assert (
        "not finished" in text
        and "Nothing has been logged yet" in text
        and "There is none yet" in text
        and "has no adapter" in text
    )


def test_two_runs_share_a_page_and_names_are_escaped(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints", "evaluation"))
    (other / "run.json").write_text('{"name": "<script>alert(1)</script>"}')
    lora = json.loads((other / "lora.json").read_text()) | {"base_path": "/nowhere/base.pt"}
    (other / "lora.json").write_text(json.dumps(lora))
    text = render([read_run(run), read_run(other)], [read_evaluation(run / "evaluation")])
    assert "<script>" not in text and "norms are absolute" in read(text).text


def test_mistakes_are_sentences(run, tmp_path, page):
    with pytest.raises(UserError, match="is no run folder"):
        tool.main([str(tmp_path)])
    with pytest.raises(UserError, match="exists already"):
        tool.main([str(run)])
    with pytest.raises(UserError, match="make it with tools/evaluate.py"):
        tool.main([str(run), "--evaluation", str(tmp_path), "--out", str(tmp_path / "x.html")])
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("checkpoints"))
    next((broken / "evaluation/lora/gallery").glob("*.jpg")).unlink()
    with pytest.raises(UserError, match="cannot read the picture"):
        tool.main([str(broken), "--force"])
    (broken / "lora.json").write_text("{")
    with pytest.raises(UserError, match="lora.json is damaged"):
        tool.main([str(broken), "--force"])
