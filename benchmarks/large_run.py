"""SAM 2.1 large on a CPU: two optimizer steps at 1024 px, killed and resumed in between, exported, merged, \
verified.

    python -m benchmarks.large_run [--base sam2.1_hiera_large.pt] [--out runs/large]

Without --base, stock `build_sam2` creates random weights with Meta's key names. Prints seconds and peak resident memory
of each stage, and writes them to large_run.json. Needs about 7 GB of memory and four minutes.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from sam2.build_sam import build_sam2

from sam2_lora_ext.data.splits import write_split
from sam2_lora_ext.data.synthetic import write_strips
from sam2_lora_ext.utils.files import write_json

ROOT = Path(__file__).resolve().parent.parent
MARK = ".sam2_lora_large"  # marks the benchmark's folder
CONFIG = "configs/sam2.1/sam2.1_hiera_l.yaml"
OVERRIDES = [
    "trainer.accelerator=cpu",
    "trainer.optim.amp.enabled=false",
    "scratch.num_workers=0",
    "scratch.steps=2",
    "scratch.steps_per_phase=1",
    "trainer.data.train.pin_memory=false",
    "trainer.data.val.pin_memory=false",
    "scratch.clean_share=0.0",
    "trainer.metrics_every=1",
]


def watch(
    command: Sequence[str], environment: dict[str, str], log: Path, stop_when: Path | None = None
) -> dict[str, float]:
    """Runs a command, kills it as soon as `stop_when` exists, and returns its seconds and peak resident bytes."""
    began, peak = time.perf_counter(), 0
    with open(log, "a") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        watched = psutil.Process(process.pid)
        killed = False
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            if stop_when is not None and stop_when.exists():
                process.send_signal(signal.SIGKILL)
                killed = True
            time.sleep(0.2)
        code = process.wait()
    if code and not killed:
        raise UserError(f"{' '.join(command[1:4])} ended with {code}: see {log}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak_rss_bytes": peak}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, help="Meta's file; default: random weights with its keys")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/large", help="cleared first")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    if args.base is not None and (not args.base.is_file() or args.base.resolve().is_relative_to(out)):
        raise UserError(
            f"--base {args.base} is not a file, or is in --out, which is cleared: name Meta's sam2.1_hiera_large.pt"
        )
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise UserError(f"{out} is not empty and not from this benchmark: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "checkpoints").mkdir(parents=True)
    (out / MARK).touch()
    base = (args.base or out / "checkpoints/sam2.1_hiera_large.pt").resolve()
    if args.base is None:
        torch.manual_seed(0)
        torch.save({"model": build_sam2(CONFIG, device="cpu").state_dict()}, base)
    table = write_strips(out / "data", 4, clean_share=0.0)
    names = sorted(path.name for path in (table.parent / "train_images").iterdir())
    write_split(out / "data/split.csv", names, ["val" if i == 3 else "train" for i in range(len(names))], force=True)
    environment = {
        **os.environ,
        "SEVERSTAL_ROOT": str(out / "data"),
        "SAM2_CHECKPOINTS": str(base.parent),
        "SAM2_LORA_RUNS": str(out),
    }
    run = out / "severstal_lora"
    command = [sys.executable, "-m", "sam2_lora_ext.train", "-c", "severstal_lora", *OVERRIDES]
    command.append(f"trainer.checkpoint.model_weight_initializer.state_dict.checkpoint_path={base}")

    stages = {}
    print("first step, then kill -9 ...", flush=True)
    stages["train_step_1_and_kill"] = watch(
        command, environment, out / "train.log", stop_when=run / "checkpoints/checkpoint.pt"
    )
    print("resume, second step ...", flush=True)
    stages["resume_step_2"] = watch(command, environment, out / "train.log")
    if "Resuming training from" not in (out / "train.log").read_text() or not (run / "training_summary.json").exists():
        raise UserError(f"the second start did not resume the first: see {out / 'train.log'}")
    print("export, merge, verify ...", flush=True)
    export = [sys.executable, "tools/export_adapter.py", str(run), str(out / "adapter")]
    stages["export"] = watch(export, environment, out / "tools.log")
    merge = [
        sys.executable,
        "tools/merge_lora.py",
        "--base",
        str(base),
        "--adapter",
        str(out / "adapter"),
        "--out",
        str(out / "merged.pt"),
    ]
    stages["merge"] = watch(merge, environment, out / "tools.log")
    stages["merge_and_verify"] = watch([*merge, "--force", "--verify", CONFIG], environment, out / "tools.log")
    sizes = {
        name: (out / path).stat().st_size
        for name, path in {
            "checkpoint_bytes": "severstal_lora/checkpoints/checkpoint.pt",
            "adapter_bytes": "adapter/adapter_model.safetensors",
            "merged_bytes": "merged.pt",
        }.items()
    }
    write_json(out / "large_run.json", {"stages": stages, **sizes, "threads": torch.get_num_threads()})
    for name, stage in stages.items():
        print(f"{name:24} {stage['seconds']:8.1f} s   {stage['peak_rss_bytes'] / 1e9:6.2f} GB peak resident")
    print(
        "".join(f"{name:24} {size / 1e6:10.2f} MB\n" for name, size in sizes.items()) + f"written {out}/large_run.json"
    )


if __name__ == "__main__":
    run_cli(main)
