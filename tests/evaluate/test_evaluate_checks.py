"""Errors that would end an evaluation midway are found before it starts."""

import shutil

import evaluate as tool
import pytest
from PIL import Image

from sam2_lora_ext.evaluate.checks import LONGEST, check_outputs
from sam2_lora_ext.utils.errors import UserError


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be evaluated."""
    monkeypatch.setattr("sam2_lora_ext.evaluate.compare.run_model", lambda *_: pytest.fail("a model was evaluated"))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--compare", "x" * (LONGEST + 1) + "={base}"], f"at most {LONGEST} bytes"),
        (["--compare", "a\tb={base}"], "printable"),
        (["--compare", "evaluation.md={base}"], "a file of the evaluation"),
        (["--split", "tset"], "has no split 'tset'"),
        (["--min-area", "9999999"], "check --limit"),
        (["--data", "gone"], "there is no gone"),
        (["--out", "o/" + "x" * 201], "too long for a file system"),
        (["--out", "/proc/x"], "/proc is not a writable folder"),
        (["--data", "/dev/null"], "is a pipe or a device, not a file; name a data set"),
        (["--compare", "m=/dev/zero"], "is a pipe or a device, not a file: give a run folder"),
        (["--device", "cuda:77"], "is missing"),
    ],
)
def test_mistakes_are_found_before_a_model_is_asked(nano_base, strips, tmp_path, unasked, words, match):
    filled = [word.format(base=nano_base) for word in words]
    model = [] if "--compare" in filled else ["--checkpoint", str(nano_base)]
    splits = ["--data", str(strips), "--split-file", str(strips / "split.csv"), "--split", "val"]
    with pytest.raises(UserError, match=match):
        tool.main([*model, "--out", str(tmp_path / "out"), *splits, *filled])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "--automatic-thresholds 0.8 1.5",
        "--automatic-thresholds nan 0.5",
        "--limit 0",
        "--overlap -1",
        "--image-size 100",
        "--max-clicks 0",
        "--crop some",
        "--seed -1",
    ],
)
def test_numbers_have_ranges(nano_base, strips, tmp_path, unasked, capsys, text):
    words = text.split()
    with pytest.raises(SystemExit) as ended:
        tool.main(["--checkpoint", str(nano_base), "--data", str(strips), *words, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and f"argument {words[0]}: must be" in capsys.readouterr().err


def test_files_in_the_way_are_found_before_a_model_is_asked(nano_base, strips, tmp_path, unasked):
    model = ["--compare", f"m={nano_base}", "--data", str(strips)]
    ways = {
        "evaluation.md": "exists already",
        "m/submission.csv": "exists already",
        "m/gallery/best_0.jpg": "exists already",
        "m": "not a writable folder",
    }
    for number, (file, match) in enumerate(ways.items()):
        out = tmp_path / str(number)
        (out / file).parent.mkdir(parents=True)
        (out / file).touch()
        with pytest.raises(UserError, match=match):
            tool.main([*model, "--out", str(out)])
    (tmp_path / "folder/evaluation.json").mkdir(parents=True)
    with pytest.raises(UserError, match="replaced"):
        tool.main([*model, "--out", str(tmp_path / "folder"), "--force"])
    check_outputs(tmp_path / "1", ["m"], force=True)
    with pytest.raises(UserError, match="submission.csv is an input"):  # whatever it is
        check_outputs(tmp_path / "1", ["m"], force=True, inputs=[tmp_path / "1/m/submission.csv"])


def test_a_damaged_image_is_found_before_a_model_is_asked(nano_base, strips, tmp_path, unasked):
    copy = tmp_path / "strips"
    shutil.copytree(strips, copy)
    names = [line.split(",")[0] for line in (copy / "split.csv").read_text().splitlines() if line.endswith(",val")]
    file = copy / "train_images" / names[-1]
    Image.open(file).convert("L").save(file.with_suffix(".png"))
    data = bytearray(file.with_suffix(".png").read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    file.with_suffix(".png").unlink()
    words = ["--data", str(copy), "--split-file", str(copy / "split.csv"), "--split", "val"]
    with pytest.raises(UserError, match=names[-1]):
        tool.main(["--checkpoint", str(nano_base), *words, "--out", str(tmp_path / "out")])
