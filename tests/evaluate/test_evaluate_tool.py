"""tools/evaluate.py from files to files: several models on the same objects, what is written, and mistakes of users."""

import json
import shutil
from pathlib import Path

import evaluate as tool
import pytest
import torch
from PIL import Image
from sam2.build_sam import build_sam2

from sam2_lora_ext.adapters.merge_state import merge_state_dict
from sam2_lora_ext.adapters.peft import load_adapter, save_adapter
from sam2_lora_ext.adapters.weights import read_weights, weights_id, write_weights
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.records import ImageRecord
from sam2_lora_ext.evaluate.models import build, candidate, candidates
from sam2_lora_ext.evaluate.text import describe
from sam2_lora_ext.lora import lora_layers
from sam2_lora_ext.lora.adapter_state import Adapter
from sam2_lora_ext.lora.inject import build_lora_model
from sam2_lora_ext.utils.errors import UserError

QUICK = ["--max-clicks", "2", "--clean-clicks", "2", "--pictures", "1"]


@pytest.fixture(scope="module")
def models(nano_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, an adapter that changes much, and the two merged."""
    folder = tmp_path_factory.mktemp("models")
    model = build_sam2("configs/sam2_nano.yaml", str(nano_base), device="cpu", apply_postprocessing=False)
    build_lora_model(
        model, {"targets": ["sam_mask_decoder.transformer.*.q_proj", "image_encoder.trunk.blocks.*.attn.qkv"]}
    )
    torch.manual_seed(1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.05)
    base = read_weights(nano_base)
    adapter = Adapter.from_model(model, {"base_id": weights_id(base), "base_path": str(nano_base)})
    save_adapter(adapter, folder / "run/adapters/best")
    write_weights(folder / "merged.pt", merge_state_dict(base, adapter))
    write_weights(folder / "full/weights/best.pt", base)
    return {"base": nano_base, "run": folder / "run", "merged": folder / "merged.pt", "full": folder / "full"}


@pytest.fixture(scope="module")
def finished(models: dict[str, Path], strips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("evaluation") / "an evaluation"
    compared = [f"base={models['base']}", f"lora={models['run']}", str(models["merged"])]
    tool.main(["--compare", *compared, *val_split(strips), "--out", str(out), *QUICK])
    return out, json.loads((out / "evaluation.json").read_text())


def val_split(strips: Path) -> list[str]:
    return ["--data", str(strips), "--split-file", str(strips / "split.csv"), "--split", "val"]


def test_every_model_was_asked_about_the_same_objects(finished):
    _, record = finished
    assert [model["name"] for model in record["models"]] == ["base", "lora", "merged"]
    asked = [[(row["image"], row["object_id"]) for row in model["objects"]] for model in record["models"]]
    assert asked[0] == asked[1] == asked[2] and len(asked[0]) == record["data"]["objects"] > 0


def test_every_number_is_there_with_an_interval(finished):
    _, record = finished
    prompts = ["1click", "2clicks", "box", "box_5", "box_10", "box_20"]
    wanted = {f"{kind}_{prompt}" for kind in ("iou", "dice", "boundary") for prompt in prompts}
    wanted |= {f"{kind}_{goal}" for kind in ("clicks_to", "missed") for goal in (80, 90)}
    for model in record["models"]:
        assert set(model["metrics"]) == wanted
        assert all(value["low"] <= value["mean"] <= value["high"] for value in model["metrics"].values())
        assert sum(values["iou_box"]["objects"] for values in model["classes"].values()) == record["data"]["objects"]
        assert sum(values["iou_box"]["objects"] for values in model["sizes"].values()) == record["data"]["objects"]
        assert 0 <= model["presence"]["auroc"] <= 1 and 0 <= model["presence"]["false_alarms"] <= 1
        assert set(model["kaggle"]) == set(prompts)
        assert all(model["speed"][key] > 0 for key in ("encode_ms", "click_ms", "box_ms"))
        for scores in model["kaggle"].values():
            assert scores["dice_ci95"][0] <= scores["dice"] <= scores["dice_ci95"][1]
    assert record["models"][1]["trained_parameters"] > 0 and record["models"][2]["trained_parameters"] is None
    changes = record["differences"]["lora"]
    assert set(changes) == wanted | {"auroc", "false_alarms"} | {f"kaggle_{prompt}" for prompt in prompts}
    assert all(value["low"] <= value["mean"] <= value["high"] for value in changes.values())


def test_the_live_adapter_and_the_merged_file_give_the_same_and_the_base_does_not(finished):
    _, record = finished
    base, lora, merged = ([row["areas"]["1click"] for row in model["objects"]] for model in record["models"])
    assert base != lora
    for a, b in zip(lora, merged, strict=True):  # of ~400,000 pixels: float32 sums in another order
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 4
    assert set(record["differences"]) == {"lora", "merged"}
    assert record["differences"]["lora"]["iou_1click"]["mean"] == pytest.approx(
        record["models"][1]["metrics"]["iou_1click"]["mean"] - record["models"][0]["metrics"]["iou_1click"]["mean"]
    )


def test_files_are_written_and_readable(finished, strips):
    out, record = finished
    for model in record["models"]:
        assert {entry["kind"] for entry in model["gallery"]} >= {"best"}
        for entry in model["gallery"]:
            with Image.open(out / entry["file"]) as picture:
                assert picture.format == "JPEG" and picture.width <= 900
    items = list(KaggleReader(strips / "train_images", out / "base/submission.csv").records())
    predicted = {item.name: item.masks for item in items if isinstance(item, ImageRecord) and item.masks}
    assert len(items) == 12 and predicted  # no problem is among them
    assert all(row["image"] in predicted for row in record["models"][0]["objects"] if row["areas"]["1click"][1])
    text = (out / "evaluation.md").read_text()
    assert "IoU 1 click" in text and "AUROC" in text and "Differences from base" in text
    thresholds = [f"{model['presence']['threshold']:.2f}" for model in record["models"]]
    assert f"| object score at this recall | {' | '.join(thresholds)} |" in text


def test_tiles_and_an_adapter_alone(models, strips, tmp_path, capsys):
    how = ["--limit", "3", "--tile", "800", "--overlap", "64", "--automatic", "2", *QUICK]
    tool.main(["--adapter", str(models["run"]), "--data", str(strips), *how, "--out", str(tmp_path / "tiles")])
    record = json.loads((tmp_path / "tiles/evaluation.json").read_text())
    assert record["protocol"]["tile"] == 800 and record["models"][0]["kaggle"] is None
    assert "automatic_recall" in record["models"][0]["metrics"] and "written" in capsys.readouterr().out


def test_the_same_clicks_for_all(models, strips, tmp_path, finished):
    """Without the option only the first click is common; with it the second too."""

    def second_clicks(record):
        return [[row["clicks"][1] for row in model["objects"]] for model in record["models"]]

    firsts = [[row["clicks"][0] for row in model["objects"]] for model in finished[1]["models"]]
    assert firsts[0] == firsts[1] == firsts[2]
    own = second_clicks(finished[1])
    assert own[0] != own[1]
    compared = [f"base={models['base']}", f"lora={models['run']}"]
    tool.main(["--compare", *compared, *val_split(strips), "--same-clicks", *QUICK, "--out", str(tmp_path / "same")])
    record = json.loads((tmp_path / "same/evaluation.json").read_text())
    assert second_clicks(record) == [own[0], own[0]] and "clicks of base for all" in describe(record)
    before, after = finished[1]["models"][1]["objects"], record["models"][1]["objects"]
    assert [row["areas"]["box"] for row in before] == [row["areas"]["box"] for row in after]


def test_another_image_size(models, strips, tmp_path):
    how = ["--limit", "4", *QUICK, "--image-size", "192", "--out", str(tmp_path / "larger")]
    tool.main(["--checkpoint", str(models["base"]), "--data", str(strips), *how])
    record = json.loads((tmp_path / "larger/evaluation.json").read_text())
    assert record["models"][0]["image_size"] == 192 == 1.5 * build(candidate(str(models["base"])))[0].image_size


def test_what_a_path_means(models, tmp_path):
    assert candidate(str(models["full"])).weights == models["full"] / "weights/best.pt"
    assert candidate("mine=" + str(models["run"])).name == "mine"
    found = candidate(str(models["run"] / "adapters/best"))
    assert found.weights == models["base"] and found.adapter == models["run"] / "adapters/best" and found.name == "run"
    model, facts = build(candidate(str(models["merged"])))
    assert facts["config"] == "configs/sam2_nano.yaml" and not model.training
    (tmp_path / "lr=1e-3").mkdir()
    shutil.copy(models["merged"], tmp_path / "lr=1e-3/m.pt")
    assert candidate(str(tmp_path / "lr=1e-3/m.pt")).name == "m"


def test_a_base_that_was_moved_is_taken_from_the_comparison(models, tmp_path):
    adapter = load_adapter(models["run"] / "adapters/best")
    adapter.metadata["base_path"] = "/gone/base.pt"
    save_adapter(adapter, tmp_path / "moved/adapters/best")
    found = candidates([str(models["base"]), str(tmp_path / "moved")])[1]
    assert found.weights == models["base"] and build(found)[1]["trained_parameters"] > 0
    with pytest.raises(UserError, match=r"its base \(/gone/base.pt\) is missing"):
        candidate(str(tmp_path / "moved"))
    with pytest.raises(UserError, match=r"its base \(other.pt\) is missing"):  # what was named is never replaced
        candidates([str(models["base"]), str(tmp_path / "moved")], Path("other.pt"))


def test_a_run_of_norms_alone_is_a_model_with_few_trained_parameters(models, tmp_path):
    """A run without adapters writes full weights and a lora.json with the trained parameters."""
    (tmp_path / "norms/weights").mkdir(parents=True)
    shutil.copy(models["base"], tmp_path / "norms/weights/best.pt")
    (tmp_path / "norms/lora.json").write_text('{"trained": 1234, "config": {"targets": []}}')
    _, facts = build(candidate(str(tmp_path / "norms")))
    assert facts["trained_parameters"] == 1234 and facts["file_bytes"] == models["base"].stat().st_size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "x"], "nothing to evaluate"),
        (["--checkpoint", "{base}", "--data", "{strips}", "--overlap", "8"], "--overlap needs --tile"),
        (["--checkpoint", "{base}", "--data", "{strips}", "--crop", "8", "--tile", "8"], "exclude each other"),
        (["--checkpoint", "nowhere.pt", "--data", "{strips}"], "there is no nowhere.pt"),
        (["--checkpoint", "{base}", "--data", "{strips}/nothing"], "there is no"),
        (["--compare", "{base}", "{base}", "--data", "{strips}"], "a unique name"),
        (
            ["--checkpoint", "{base}", "--data", "{strips}", "--submission-prompt", "3clicks"],
            "--submission-prompt must be one of",
        ),
        (
            ["--checkpoint", "{base}", "--config", "configs/sam2.1/sam2.1_hiera_t.yaml", "--data", "{strips}"],
            "do not fit the model",
        ),
        (["--checkpoint", "{base}", "--config", "configs/nope.yaml", "--data", "{strips}"], "there is no config"),
        (["--checkpoint", "{base}", "--device", "cuda:77", "--data", "{strips}"], "cuda:77 is missing"),
        (["--checkpoint", "{base}", "--device", "tpu", "--data", "{strips}"], "--device must be cpu"),
        (["--compare", "{base}", "--adapter", "{base}", "--data", "{strips}"], "add its path to --compare"),
        (["--checkpoint", "{base}", "--data", "{strips}", "--limit", "3", "--min-area", "9999999"], "check --limit"),
    ],
)
def test_mistakes_are_sentences(models, strips, tmp_path, arguments, words):
    filled = [argument.format(base=models["base"], strips=strips) for argument in arguments]
    with pytest.raises(UserError, match=words):
        tool.main([*filled, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out/evaluation.json").exists()


def test_an_adapter_of_another_base_is_refused_and_results_are_not_overwritten(models, strips, tmp_path, finished):
    state = {key: value + 1 for key, value in read_weights(models["base"]).items()}
    write_weights(tmp_path / "other.pt", state)
    other, data = ["--checkpoint", str(tmp_path / "other.pt")], ["--data", str(strips)]
    with pytest.raises(UserError, match="was trained on"):
        tool.main(["--adapter", str(models["run"]), *other, *data, "--out", str(tmp_path)])
    with pytest.raises(UserError, match="exists already"):
        tool.main(["--checkpoint", str(models["base"]), *data, "--out", str(finished[0])])


def test_a_mistake_in_the_last_model_is_found_before_the_first_is_asked(models, strips, tmp_path):
    state, out = read_weights(models["base"]), tmp_path / "out"
    write_weights(tmp_path / "other.pt", {key: value for key, value in state.items() if "iou" not in key})
    with pytest.raises(UserError, match="do not fit the model"):
        tool.main(["--compare", str(models["base"]), str(tmp_path / "other.pt"), *val_split(strips), "--out", str(out)])
    assert not out.exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a writable folder"):
        tool.main(["--checkpoint", str(models["base"]), *val_split(strips), "--out", str(tmp_path / "file/out")])
    (out / "base").mkdir(parents=True)
    (out / "base/submission.csv").touch()  # of an evaluation that was stopped
    with pytest.raises(UserError, match="submission.csv exists already"):
        tool.main(["--compare", f"base={models['base']}", *val_split(strips), "--out", str(out)])


def test_a_model_that_diverged_is_named(models, strips, tmp_path):
    state = {key: value.clone() for key, value in read_weights(models["base"]).items()}
    state["sam_mask_decoder.pred_obj_score_head.layers.2.bias"][:] = float("inf")
    write_weights(tmp_path / "diverged.pt", state)
    with pytest.raises(UserError, match="diverged: the object score of .* is inf"):
        tool.main(["--checkpoint", str(tmp_path / "diverged.pt"), *val_split(strips), "--out", str(tmp_path / "out")])
