#!/usr/bin/env python
"""Runs the whole product on a CPU in a few minutes: synthetic strips, training, adapter, merge, proof, pictures.

    make demo            (or: python tools/demo.py [--out runs/demo])

Trains with clicks by SAM 2's unmodified launcher, then trains class prompts, which inspect strips without clicks.
All output goes to --out, which is cleared first.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import csv
import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
from sam2_lora_ext.host.configs import import_launcher
from sam2_lora_ext.settings.arguments import SEED, number
from sam2_lora_ext.settings.kinds import Whole
from sam2_lora_ext.utils.files import write_json

CONFIG = "configs/sam2_nano.yaml"
BASE = ROOT / "assets/sam2_nano.pt"
CROP = 256  # columns of a strip in view, as in configs/demo.yaml
MARK = ".sam2_lora_demo"  # file that marks a folder of the demo, which may be cleared
CLASS_STEPS = os.getenv("SAM2_LORA_DEMO_STEPS", "300")
# Class steps only, and the small decoder in full: in so few steps it learns more than its LoRA (docs/results.md).
CLASSES = (
    "-m",
    "sam2_lora_ext.train",
    "-c",
    "demo_classes",
    "trainer.mode=train_only",
    "scratch.lr=1e-3",
    "lora.targets=[image_encoder.trunk.blocks.*.attn.qkv,image_encoder.trunk.blocks.*.attn.proj]",
    "lora.trainable=[sam_mask_decoder]",
    "dataset.class_prompts={share: 1.0, corrections: 0.0, around: 0.8}",
    "trainer.loss.severstal.weight_dict.loss_class=3",
)
COLUMNS = ("iou_1click", "iou_8clicks", "iou_box", "dice_1click", "dice_8clicks", "dice_box")


def clear(folder: Path) -> None:
    """Empties the demo's folder; refuses a folder that the demo did not create."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise UserError(f"{folder} is not empty and not from an earlier demo: choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def write_data(folder: Path, strips: int, seed: int) -> None:
    """Writes synthetic strips in Kaggle's layout, and split.csv: every fifth strip is val, a fifth more are test."""
    from sam2_lora_ext.data.splits import write_split
    from sam2_lora_ext.data.synthetic import write_strips

    write_strips(folder, strips + strips // 5, seed)
    names = sorted(path.name for path in (folder / "train_images").iterdir())
    parts = ["test" if i >= strips else "val" if i % 5 == 4 else "train" for i in range(len(names))]
    write_split(folder / "split.csv", names, parts)


def train(out: Path, data: Path, name: str, base: Path, *command: str) -> Path:
    """Runs a training from a base with a progress bar; returns its folder, called `name`."""
    environment = {
        **os.environ,
        "SEVERSTAL_ROOT": str(data),
        "SEVERSTAL_SPLIT": str(data / "split.csv"),
        "SAM2_LORA_NANO": str(base),
        "SAM2_LORA_DEMO_RUN": str(out / name),
    }
    print("training: python " + shlex.join(command), flush=True)
    log = out / f"{name}.log"
    metrics = out / name / "logs/metrics.csv"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            with tqdm(desc="training", unit="step") as bar:
                while process.poll() is None:
                    time.sleep(0.5)
                    follow(bar, metrics)
                follow(bar, metrics)
        finally:
            process.kill()
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise UserError(f"training ended with exit code {process.returncode}; its log is {log}, and ends with:\n{tail}")
    return out / name


def follow(bar: tqdm, metrics: Path) -> None:
    """Moves the bar to the newest row of a run's metrics.csv."""
    if not metrics.exists():
        return
    with open(metrics, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("step")]
    if rows and int(rows[-1]["step"]) != bar.n:
        bar.update(int(rows[-1]["step"]) - bar.n)
        shown = {"train_loss": "train", "val_iou_1click": "val"}
        for name, phase in shown.items():
            key = "loss" if phase == "train" else "iou_1click"
            if last := [row for row in rows if row["phase"] == phase and row.get(key)]:
                shown[name] = f"{float(last[-1][key]):.3f}"
        bar.set_postfix({name: value for name, value in shown.items() if value not in ("train", "val")})


def tool(*arguments: str | Path) -> None:
    """Runs one of our command lines as a user would."""
    command = [sys.executable, *map(str, arguments)]
    print("$ python " + " ".join(map(str, arguments)), flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        raise UserError(f"{arguments[0]} failed: see its output above")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/demo", help="cleared first (default: runs/demo)")
    parser.add_argument(
        "--strips", type=number(Whole(5, 100_000)), default=200, help="synthetic strips to draw (default: 200)"
    )
    parser.add_argument("--seed", type=number(SEED), default=42)
    args = parser.parse_args(argv)
    import_launcher()  # checks early that SAM 2 can be imported
    import torch
    from sam2.build_sam import build_sam2

    from sam2_lora_ext.adapters.peft import load_adapter
    from sam2_lora_ext.adapters.weights import read_weights
    from sam2_lora_ext.data.dataset import SeverstalRawDataset
    from sam2_lora_ext.data.kaggle import KaggleReader
    from sam2_lora_ext.evaluate.before_after import draw_before_after
    from sam2_lora_ext.evaluate.predictor import averages, evaluate, max_logit_difference, read_samples
    from sam2_lora_ext.inspection.demo import figures, inspect, table
    from sam2_lora_ext.lora.adapter_state import attach_adapter

    if not BASE.exists():
        raise UserError(f"there is no {BASE}: restore it from the repository, or run tools/make_demo_base.py")
    out = args.out.resolve()
    clear(out)
    data = out / "data"
    write_data(data, args.strips, args.seed)
    dataset = SeverstalRawDataset(
        KaggleReader(data / "train_images", data / "train.csv"),
        training=False,
        split_file=data / "split.csv",
        split="val",
        min_area=16,
        max_objects=16,
        group_width=CROP,
    )
    samples = list(read_samples(dataset, CROP))

    def build(weights: Path) -> torch.nn.Module:
        return build_sam2(CONFIG, str(weights), device="cpu", apply_postprocessing=False)

    results, seconds = {}, {"train": 0.0, "evaluate": 0.0}

    def measure(name: str, model: torch.nn.Module) -> None:
        began = time.perf_counter()
        results[name] = averages(evaluate(model, tqdm(samples, desc=f"evaluating {name}", unit="image")))
        seconds["evaluate"] += time.perf_counter() - began

    base = build(BASE)
    measure("base", base)
    began = time.perf_counter()
    run = train(out, data, "train", BASE, "-m", "training.train", "-c", "configs/demo.yaml")
    seconds["train"] = time.perf_counter() - began

    adapter_folder, merged_file = out / "adapter", out / "sam2_nano_steel.pt"
    tool("tools/export_adapter.py", run, adapter_folder)
    tool("tools/merge_lora.py", "--base", BASE, "--adapter", adapter_folder, "--out", merged_file, "--verify", CONFIG)
    adapter = load_adapter(adapter_folder)
    lora = attach_adapter(build(BASE), adapter)
    merged = build(merged_file)
    measure("lora", lora)
    measure("merged", merged)

    state, before = read_weights(merged_file), read_weights(BASE)
    weight_difference = 0.0
    for name, layer in adapter.layers.items():
        exact = before[f"{name}.weight"].double() + layer.delta_weight()
        weight_difference = max(weight_difference, float((state[f"{name}.weight"].double() - exact).abs().max()))
    facts = json.loads((run / "training_summary.json").read_text())
    summary = {
        **results,
        "merge": {
            "max_abs_weight_diff": weight_difference,
            "max_abs_logit_diff": max_logit_difference(lora, merged, samples),
        },
        "params": facts["parameters"],
        "seconds": seconds,
    }
    draw_before_after(out / "overlays.png", samples, base, merged)
    show(summary, len(samples))
    began = time.perf_counter()
    run = train(out, data, "classes", merged_file, *CLASSES, f"scratch.steps={CLASS_STEPS}")
    result = inspect(run, merged_file, out / "inspection.png")
    seconds["inspection"] = time.perf_counter() - began
    summary |= {"inspection": figures(result), "seconds": {name: round(value, 1) for name, value in seconds.items()}}
    write_json(out / "summary.json", summary)
    print(f"\n{table(result)}\n\ntime                 training, fitting and inspection {seconds['inspection']:.0f} s")
    print(
        f"written              {out / 'summary.json'}, overlays.png, inspection.png, sam2_nano_steel.pt, adapter/, "
        "train/, classes/"
    )


def show(summary: dict, count: int) -> None:
    """Prints the metrics by model, the trained parameters and the differences of the merge."""
    print(f"\n{count} validation samples, means over defects")
    print(f"{'':8}" + "".join(f"{name:>14}" for name in COLUMNS))
    for name in ("base", "lora", "merged"):
        print(f"{name:8}" + "".join(f"{summary[name][column]:14.4f}" for column in COLUMNS))
    params, merge, seconds = summary["params"], summary["merge"], summary["seconds"]
    print(
        f"\ntrained parameters   {params['trained']:,} of {params['total']:,} "
        f"({params['trained'] / params['total']:.2%})"
    )
    print(
        f"merged vs unmerged   weights {merge['max_abs_weight_diff']:.2e}, "
        f"mask logits {merge['max_abs_logit_diff']:.2e} at most"
    )
    print(f"time                 training {seconds['train']:.0f} s, evaluation {seconds['evaluate']:.0f} s")


if __name__ == "__main__":
    run_cli(main)
