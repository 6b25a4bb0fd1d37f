"""Clips of four windows through the Trainer, and one defect tracked along a strip by the stock video predictor."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import track_strip
from PIL import Image
from safetensors.torch import load_file

from helpers.small_runs import environment, launch, rank_environment, write_config
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.tiles import stitch
from sam2_lora_ext.data.windows import Windows
from sam2_lora_ext.deploy.tracking import draw, track
from sam2_lora_ext.evaluate.arguments import parse
from sam2_lora_ext.evaluate.conditions import settle
from sam2_lora_ext.evaluate.models import candidates
from sam2_lora_ext.host.compose import compose
from sam2_lora_ext.utils.errors import UserError

FOUR_FRAMES = (
    "scratch.crop_width=256",
    "scratch.window_stride=128",
    "scratch.num_frames=4",
    "scratch.steps=4",
    "scratch.steps_per_phase=2",
    "trainer.data.val.batch_sizes=[2]",
    "scratch.clean_share=0.3",
)


def test_the_leaf_composes_with_windows_and_memory_attention(tmp_path):
    with rank_environment({"SAM2_LORA_RUNS": str(tmp_path)}):
        config = compose("configs/severstal_lora_video.yaml", [])
        train = config.trainer.data.train.datasets[0].dataset  # inside the RepeatFactorWrapper
        assert (
            train.video_dataset.windows == {"width": 512, "stride": 256, "num_frames": 4}
            and train.sampler.num_frames == 4
        )
        assert any(target.startswith("memory_attention") for target in config.trainer.model.lora.targets)
        assert config.trainer.model.image_size == 1024 and "hiera_large" in str(
            config.trainer.checkpoint.model_weight_initializer.state_dict.checkpoint_path
        )


@pytest.fixture(scope="module")
def merged(tmp_path_factory, nano_base, strips, repository, run_python):
    """A run of four steps on clips of four frames, merged: (run folder, merged file)."""
    folder = tmp_path_factory.mktemp("video")
    config = write_config(folder / "config", FOUR_FRAMES)
    config.write_text(config.read_text().replace("  - /configs/demo\n", "  - /configs/demo\n  - /configs/base/video\n"))
    process = launch(config, environment(nano_base, strips, folder / "run"))
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-4000:]
    run_python(
        [
            repository / "tools/merge_lora.py",
            "--base",
            nano_base,
            "--adapter",
            folder / "run",
            "--out",
            folder / "merged.pt",
        ],
        check=True,
    )
    return folder / "run", folder / "merged.pt"


def test_trainer_learns_from_clips(merged):
    run, _ = merged
    with open(run / "logs/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows].count("val") == 2
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    adapter = load_file(next(run.rglob("final*/adapter_model.safetensors")))
    moved = [name for name, value in adapter.items() if "memory_attention" in name and "lora_B" in name and value.any()]
    assert moved, "the memory attention got no gradient"


def test_stock_video_predictor_follows_a_defect_and_draws_it(merged, strips, tmp_path, run_python, repository):
    index = build_index(KaggleReader(strips / "train_images", strips / "train.csv"))
    image = next(image for image in range(len(index)) if len(index.masks(image)))
    start, length = index.masks(image)[0][1][0].tolist()
    x, y = (start + length // 2) // 256, (start + length // 2) % 256
    command = [
        repository / "tools/track_strip.py",
        "--checkpoint",
        merged[1],
        "--config",
        "configs/sam2_nano.yaml",
        "--image",
        index.path(image),
        "--width",
        256,
        "--stride",
        128,
        "--device",
        "cpu",
        "--out",
        tmp_path / "tracked.png",
    ]
    done = run_python([*command, "--click", f"{x},{y}"], check=True)
    assert "12 windows" in done.stdout  # (1600 - 256) / 128, rounded up, and the first
    picture = np.asarray(Image.open(tmp_path / "tracked.png"))
    assert picture.shape == (512 + 5 + 128, 1600, 3)  # the strip twice, and twelve windows of 128 x 128
    np.testing.assert_array_equal(picture[:256], np.asarray(Image.open(index.path(image)).convert("RGB")))
    assert picture[256 + y, x].tolist() == [255, 40, 40]
    arguments = [*map(str, command[1:]), "--force", "--click", f"{x},{y}"]
    for wrong, words in (
        (["--click", "1600,5"], "--click"),
        (["--click", "5"], "--click"),
        (["--click", "a,b"], "--click"),
        (["--config", "gone.yaml"], "there is no config 'gone.yaml'"),
        (["--checkpoint", index.path(image)], "not a file of weights"),
        (["--device", "xyz"], "--device must be cpu"),
    ):
        with pytest.raises(UserError, match=words):
            track_strip.main([*arguments, *wrong])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "tracked.png")), picture)  # still the old one


def test_the_run_says_how_its_strips_are_seen(merged, strips, tmp_path, capsys):
    """Windows, bits and resolution come from the run; its own evaluation looks at single windows, and says so."""
    image = str(next((strips / "train_images").iterdir()))
    words = ["--checkpoint", str(merged[1]), "--image", image, "--click", "800,128", "--device", "cpu"]
    track_strip.main([*words, "--run", str(merged[0]), "--out", str(tmp_path / "a.png")])
    said = capsys.readouterr().out
    assert "windows of 256 columns, one every 128, 16 bits (from the validation data of the run" in said
    assert "12 windows" in said
    inside = str(merged[0] / "adapters/final")
    track_strip.main([*words, "--run", inside, "--width", "400", "--out", str(tmp_path / "b.png")])
    assert "windows of 400 columns, one every 200" in capsys.readouterr().out
    with pytest.raises(UserError, match="is read"):
        track_strip.main([*words, "--out", image, "--force"])
    compared = [str(merged[0])]
    found = settle(parse("", ["--compare", *compared]), candidates(compared))
    assert found.source.crop == 256 and found.source.dataset().windows is None
    assert found.sentences() == ["run: trained on windows of 256 columns as video, evaluated window by window"]
    whole = settle(parse("", ["--crop", "none", "--compare", *compared]), candidates(compared))
    assert whole.sentences() == ["run: trained at crop 256 as video, evaluated whole"]


class CopyingPredictor:
    """Replaces the video predictor: its masks are the bright pixels of each window."""

    def init_state(self, folder):
        self.frames = [np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())]

    def add_new_points_or_box(self, state, frame_idx, obj_id, points, labels):
        assert frame_idx == 0 and self.frames[0][int(points[0, 1]), int(points[0, 0]), 0] > 128

    def propagate_in_video(self, state):
        for number, frame in enumerate(self.frames):
            yield number, [1], torch.from_numpy(frame[None, None, :, :, 0] - 128.0)


def test_a_window_that_finds_nothing_does_not_outvote_the_one_that_was_clicked():
    class Forgetful(CopyingPredictor):
        def propagate_in_video(self, state):
            for number, found in enumerate(super().propagate_in_video(state)):
                yield (*found[:2], found[2] if number == 0 else torch.full_like(found[2], -1024.0))

    strip = np.zeros((16, 200, 3), np.uint8)
    strip[:, 90:110] = 255
    windows = Windows(64, 32, 2).fixed(200)
    tiles = track(Forgetful(), strip, windows, (100, 8))
    mask = stitch(tiles, [start for start, _ in windows], 200).numpy() > 0
    assert (mask == (strip[..., 0] > 0)).mean() > 0.99  # JPEG blurs the edge


def test_tracking_puts_the_windows_back_in_their_place():
    strip = np.zeros((16, 200, 3), np.uint8)
    strip[:, 90:170] = 255
    windows = Windows(64, 32, 2).fixed(200)
    tiles = track(CopyingPredictor(), strip, windows, (100, 8))
    mask = stitch(tiles, [start for start, _ in windows], 200).numpy() > 0
    assert (mask == (strip[..., 0] > 0)).mean() > 0.99  # JPEG blurs the edge
    picture = np.asarray(draw(strip, mask, (100, 8), windows, tiles.numpy() > 0))
    blue = (picture[38:, :, 2] > 100) & (picture[38:, :, 0] < 150)  # the row of windows
    step = 200 / len(windows)
    for place, (start, stop) in enumerate(windows):
        part = blue[:, round(place * step) : round((place + 1) * step) - 5]
        assert part.any() == bool(mask[:, start:stop].any())
