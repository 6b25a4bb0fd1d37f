"""The main workflow on real steel: nine strips, a few dozen steps through the launcher, merged and verified."""

import csv
import json

from helpers.small_runs import environment, launch, write_config


def test_trains_and_merges_on_real_strips(real_data, repository, nano_base, tmp_path, run_python):
    root = real_data / "severstal"
    names = sorted(path.name for path in (root / "train_images").iterdir())
    split = tmp_path / "split.csv"
    parts = [f"{name},{'val' if index % 3 == 2 else 'train'}" for index, name in enumerate(names)]
    split.write_text("\n".join(["image,split", *parts]) + "\n")
    env = environment(nano_base, root, tmp_path / "run") | {"SEVERSTAL_SPLIT": str(split)}
    config = write_config(
        tmp_path / "config",
        [
            "scratch.steps=36",
            "scratch.steps_per_phase=18",
            "scratch.batch_size=4",
            "trainer.metrics_every=6",
        ],
    )
    process = launch(config, env)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-4000:]

    with open(tmp_path / "run/logs/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows if row["phase"] == "train"]
    assert len(losses) == 6 and sum(losses[-2:]) < 0.9 * sum(losses[:2])
    validations = json.loads((tmp_path / "run/validations.json").read_text())
    assert validations[1]["metrics"]["loss"] < validations[0]["metrics"]["loss"]
    assert validations[0]["metrics"]["objects"] >= 3

    merged = tmp_path / "merged.pt"
    image = root / "train_images" / names[0]
    done = run_python(
        [
            repository / "tools/merge_lora.py",
            "--base",
            nano_base,
            "--adapter",
            tmp_path / "run",
            "--out",
            merged,
            "--verify",
            "configs/sam2_nano.yaml",
            "--image",
            image,
        ],
        check=True,
    )
    assert done.stdout.rstrip().endswith("verified") and merged.exists()
