"""The cost of a merge compared with a plain load and save of the same file: `runs/bench/merge.json`.

    python -m benchmarks.merge                SAM 2.1 large, random weights with Meta's keys, default LoRA of rank 8

Plain is `torch.save(torch.load(base), out)`; merge is `tools/merge_lora.py` with the check of the base
and the record with its hashes. Both run in separate processes, in turns (A B A B ...), timed from Python's start.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.output import add_out, check_out, write_result
from sam2_lora_ext.settings.arguments import COUNT, number

ROOT = Path(__file__).resolve().parent.parent
PREPARE = """
import sys, torch
from sam2_lora_ext.adapters.peft import Adapter, save_adapter
from sam2_lora_ext.adapters.weights import weights_id, write_weights
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.deploy.stock import build_stock
config, base, adapter, globs = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
torch.manual_seed(0)
model = build_stock(config)
write_weights(base, model.state_dict())
facts = {"base_id": weights_id(model.state_dict()), "base_path": base, "model_config": config}
build_lora_model(model, {"rank": 8, **({"targets": globs} if globs else {})})
for name, parameter in model.named_parameters():
    if name.endswith(".lora_b"):
        torch.nn.init.normal_(parameter.data, std=0.01)
save_adapter(Adapter.from_model(model, facts), adapter)
"""
PLAIN = """
import sys, torch
torch.save(torch.load(sys.argv[1], map_location="cpu", weights_only=True), sys.argv[2])
"""
# a process's getrusage starts at its parent's peak, VmHWM at zero
WATCHED = """
import os, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024, sum(os.times()[:2]))
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/sam2.1/sam2.1_hiera_l.yaml", help="a stock inference config")
    parser.add_argument("--targets", nargs="*", default=[], metavar="GLOB", help="default: the package's own")
    parser.add_argument("--rounds", type=number(COUNT), default=5, help="runs of each, after a warm-up run")
    add_out(parser, ROOT / "runs/bench/merge.json")
    args = parser.parse_args(argv)
    check_out(args)
    if args.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {args.rounds}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix="merge_") as folder:
        result = measure(Path(folder), args.config, args.targets, args.rounds)
    write_result(args, result)
    for name in ("plain", "merge"):
        row = result[name]
        peak = row["peak_rss_bytes"] / 1e6
        print(f"{name:6} {row['seconds']:7.2f} s {row['cpu_seconds']:9.2f} s of processor {peak:9.0f} MB peak")
    ratios = [result[f"ratio_{name}"] for name in ("seconds", "cpu_seconds", "peak_rss")]
    print("ratio  {:7.2f}   {:9.2f}   {:20.2f}     (the goals are 1.5 in time and 1.3 in memory)".format(*ratios))
    print(f"written {args.out}")


def measure(folder: Path, config: str, targets: Sequence[str], rounds: int) -> dict[str, Any]:
    """Creates base and adapter in `folder`, runs plain and merge in turns, and returns medians and ratios."""
    base, adapter = folder / "base.pt", folder / "adapter"
    run([sys.executable, "-c", PREPARE, config, base, adapter, *targets])
    (folder / "plain.py").write_text(PLAIN)
    scripts = {
        "plain": [folder / "plain.py", base, folder / "plain.pt"],
        "merge": [
            ROOT / "tools/merge_lora.py",
            "--base",
            base,
            "--adapter",
            adapter,
            "--out",
            folder / "merged.pt",
            "--force",
        ],
    }
    found: dict[str, list[tuple[float, int, float]]] = {name: [] for name in scripts}
    for turn in range(rounds + 1):
        for name, script in scripts.items():
            began = time.perf_counter()
            printed = run([sys.executable, "-c", WATCHED, *script])
            if turn:  # the first run fills the file caches
                peak, cpu = printed.splitlines()[-1].split()
                found[name].append((time.perf_counter() - began, int(peak), float(cpu)))
    rows: dict[str, dict[str, Any]] = {
        name: {
            "seconds": statistics.median(seconds),
            "cpu_seconds": statistics.median(cpu),
            "peak_rss_bytes": statistics.median_low(peaks),
            "all_seconds": seconds,
        }
        for name, values in found.items()
        for seconds, peaks, cpu in [zip(*values)]
    }
    ratios = {
        f"ratio_{short}": rows["merge"][key] / rows["plain"][key]
        for short, key in (("seconds", "seconds"), ("cpu_seconds", "cpu_seconds"), ("peak_rss", "peak_rss_bytes"))
    }
    sizes = {"base_bytes": base.stat().st_size, "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size}
    return {"config": config, "targets": list(targets), "rounds": rounds, **rows, **ratios, **sizes}


def run(command: Sequence[str | Path]) -> str:
    """Runs a command and returns its output; a failure ends the benchmark with its last line."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a step of the benchmark failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout


if __name__ == "__main__":
    run_cli(main)
