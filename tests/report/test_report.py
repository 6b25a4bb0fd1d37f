"""The report: from a real run and evaluation, self-contained, with commands that repeat the run."""

import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import evaluate
import pytest
import report as tool

from helpers.reported_run import page, run  # noqa: F401
from sam2_lora_ext.adapters.weights import read_weights, write_weights
from sam2_lora_ext.evaluate.protocol import Protocol
from sam2_lora_ext.evaluate.titles import details, headline
from sam2_lora_ext.host.compose import compose, locate
from sam2_lora_ext.host.configs import USER_CONFIG_DIR
from sam2_lora_ext.report.collect import Run, read_evaluation, read_run, read_runs
from sam2_lora_ext.report.page import render
from sam2_lora_ext.report.repeat import data_of, environment, training_command
from sam2_lora_ext.utils.errors import UserError


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
    headings = ["Run", "Curves", "Evaluation", "Differences from base", "By class", "By size", "Clean steel"]
    for heading in [*headings, "Pictures", "Updates by layer", "Commands to repeat it"]:
        assert heading in text
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["name"] in text and f"{summary['parameters']['trained']:,}" in text
    record = json.loads((run / "evaluation/evaluation.json").read_text())
    for model in record["models"]:
        protocol = Protocol.of(record["protocol"])
        wanted = headline(protocol) | details(protocol)
        assert all(f"{model['metrics'][key]['mean']:.3f}" in text for key in wanted)
    assert page.count("<img ") == sum(len(model["gallery"]) for model in record["models"]) > 0
    assert page.count("<svg") == 4  # three curves, one chart of blocks
    assert page.count("image/jpeg") == page.count("<img ")


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


def test_commands_of_evaluation_and_merge_are_there_and_run(page, run, tmp_path, nano_base):
    lines = [html.unescape(line) for line in re.findall("<pre>(.*?)</pre>", page, re.DOTALL)]
    assert environment(read_run(run))["SEVERSTAL_ROOT"] in lines[0]
    merge, measure = (shlex.split(next(line for line in lines if tool in line)) for tool in ("merge_lora", "evaluate"))
    assert merge[:3] == ["python", "tools/merge_lora.py", "--base"]
    again = run / "evaluation_again"  # the page's own evaluation is in the other one
    assert measure == ["python", "tools/evaluate.py", "--compare", f"base={nano_base}", str(run), "--out", str(again)]
    measure[-1] = str(tmp_path / "again")
    evaluate.main([*measure[2:], "--max-clicks", "1", "--pictures", "0"])
    again = json.loads((tmp_path / "again/evaluation.json").read_text())
    before = json.loads((run / "evaluation/evaluation.json").read_text())
    for one, other in zip(again["models"], before["models"], strict=True):
        assert [row["areas"]["box"] for row in one["objects"]] == [row["areas"]["box"] for row in other["objects"]]


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        ({"_target_": "a.COCOReader", "image_dir": "i", "json": "a.json"}, "COCO a.json, images in i"),
        ({"_target_": "a.SuperviselyReader", "root": "r"}, "Supervisely r"),
        (
            {"_target_": "a.LabelPNGReader", "image_dir": "d/images", "label_dir": "d/annotations"},
            "label images d/annotations, images in d/images",
        ),
        ({"_target_": "a.KaggleReader", "image_dir": "i", "csv": "t.csv"}, "Kaggle's csv t.csv, images in i"),
        ({"_target_": "someone.elses.Reader"}, "Reader an unknown path"),
    ],
)
def test_the_page_says_what_each_run_reads_though_the_data_is_gone(tmp_path, reader, words):
    raw = {"reader": reader, "split": "val", "split_file": "s.csv"}
    crop = {"_target_": "a.FixedStripCrop", "width": 512}
    data = {"dataset": {"video_dataset": raw, "transforms": [crop]}}
    config = {"trainer": {"data": {"val": {"datasets": [data]}}, "model": {"image_size": 128}}}
    (tmp_path / "run_config.yaml").write_text(json.dumps(config))
    assert data_of(Run(tmp_path, "run", "run")) == f"{words}, split by s.csv; crop 512, 128 px, 16 bits"
    (tmp_path / "run_config.yaml").write_text("{")
    assert "is damaged" in data_of(Run(tmp_path, "run", "run"))
    assert data_of(Run(tmp_path / "gone", "run", "run")) == "-"


# ---- what is missing or damaged -------------------------------------------------------------------------------------


def test_a_run_that_just_began_has_a_report_too(run, tmp_path):
    young = tmp_path / "young"
    young.mkdir()
    for name in ("run.json", "lora.json"):
        shutil.copy(run / name, young)
    text = read(render([read_run(young)], [])).text
    for words in ("not finished", "Nothing has been logged yet", "There is none yet", "has no adapter"):
        assert words in text


def test_two_runs_share_a_page_and_names_are_escaped(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints", "evaluation"))
    (other / "run.json").write_text('{"name": "<script>alert(1)</script>"}')
    lora = json.loads((other / "lora.json").read_text()) | {"base_path": "/nowhere/base.pt"}
    (other / "lora.json").write_text(json.dumps(lora))
    text = render(read_runs([run, other]), [read_evaluation(run / "evaluation")])
    assert "<script>" not in text and "norms are absolute" in read(text).text


def test_two_runs_with_the_same_name_are_told_apart(run, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(run, tmp_path / place / 'r"$8_1$', ignore=shutil.ignore_patterns("checkpoints", "evaluation"))
    folders = [tmp_path / place / 'r"$8_1$' for place in ("a", "b")]
    page = render(read_runs(folders), [])
    text = read(page).text
    for place in "ab":
        assert f'{place}/r"$8_1$ training' in text and f'Update by block: {place}/r"$8_1$' in text
    with pytest.raises(UserError, match="given twice"):
        read_runs([folders[0], folders[0]])


def test_what_trained_without_adapters_is_compared_with_its_base(run, tmp_path, nano_base):
    """A run of the norms alone leaves whole weights; so does full fine-tuning."""
    state = read_weights(nano_base)
    key = "image_encoder.trunk.blocks.3.norm1.weight"
    norms = tmp_path / "norms"
    shutil.copytree(run, norms, ignore=shutil.ignore_patterns("checkpoints", "evaluation", "adapters"))
    write_weights(norms / "weights/best.pt", {**state, key: state[key] * 1.5})
    lora = json.loads((norms / "lora.json").read_text())
    lora["config"] |= {"targets": [], "trainable": ["*.norm1"]}
    lora["groups"] = {"full modules": {"layers": ["a", "b"]}}
    (norms / "lora.json").write_text(json.dumps(lora))
    text = read(render([read_run(norms)], [])).text
    assert "2 modules in full" in text and "weights best, relative to the base" in text
    assert key in text and "50.00%" in text and "All 1 layers" in text
    (norms / "lora.json").write_text(json.dumps(lora | {"config": None, "base_path": "/nowhere.pt"}))
    text = read(render([read_run(norms)], [])).text
    assert "full fine-tuning" in text and "the weights cannot be compared" in text


def test_mistakes_are_sentences(run, tmp_path, page):
    with pytest.raises(UserError, match="is not a run folder"):
        tool.main([str(tmp_path)])
    with pytest.raises(UserError, match="exists already"):
        tool.main([str(run)])
    with pytest.raises(UserError, match="create it with tools/evaluate.py"):
        tool.main([str(run), "--evaluation", str(tmp_path), "--out", str(tmp_path / "x.html")])
    with pytest.raises(UserError, match="is a folder, and only files can be replaced"):
        tool.main([str(run), "--out", str(tmp_path), "--force"])
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("checkpoints"))
    next((broken / "evaluation/lora/gallery").glob("*.jpg")).unlink()
    with pytest.raises(UserError, match="cannot read the picture"):
        tool.main([str(broken), "--force"])
    record = '{"protocol": {}, "models": [{}], "differences": {}, "data": {}}'
    (broken / "evaluation/evaluation.json").write_text(record)
    with pytest.raises(UserError, match="evaluation.json is damaged or from another version"):
        tool.main([str(broken), "--force"])
    shutil.rmtree(broken / "evaluation")
    damages = {
        "lora.json": [
            ("{", "is damaged"),
            ("[]", "it contains a list"),
            ('{"config": {"a": 1}}', "is damaged or from another"),
        ],
        "training_summary.json": [('{"best": 3}', "training_summary.json or lora.json in .*broken is damaged or from")],
        "logs/metrics.csv": [("a,b\n", "its header lacks"), ("step,phase,loss\n1,train,x\n", "in the column loss")],
    }
    for file, contents in damages.items():
        for content, words in contents:
            whole = (broken / file).read_bytes()
            (broken / file).write_text(content)
            with pytest.raises(UserError, match=words):
                tool.main([str(broken), "--force"])
            (broken / file).write_bytes(whole)
    (broken / "logs/metrics.csv").write_text("step,phase,loss\n1,train,nan\n2,train,0.5\n3,train,inf\n")
    tool.main([str(broken), "--force"])  # a run that diverged has a report
    assert read_run(broken).curve("train", "loss") == ([2.0], [0.5])
