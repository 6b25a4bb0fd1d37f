"""Communication of ranks per step: the bytes of gradients that DDP reduces, for LoRA and full fine-tuning.

    python -m benchmarks.traffic [--configs severstal_lora severstal_full]

Counted in DDP's own communication hook while one backward pass runs, on SAM 2.1 large by default, with random weights.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from torch.nn.parallel import DistributedDataParallel

from benchmarks.output import add_out, check_out, write_result
from sam2_lora_ext.host.compose import compose, locate


def reduced_bytes(config: str) -> tuple[int, int]:
    """(bytes reduced in a backward pass, trained parameters) of a config's model; the process group must exist.

    The pass uses every trained parameter.
    """
    name, _ = locate(config)
    model = instantiate(compose(name, ["trainer.accelerator=cpu"]).trainer.model, _convert_="all")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    class Touch(torch.nn.Module):
        """Uses every trained parameter once: the traffic does not depend on the computation."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> torch.Tensor:
            return sum(parameter.flatten()[0] for parameter in trained)

    wrapped, sent = DistributedDataParallel(Touch()), [0]

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent[0] += bucket.buffer().numel() * bucket.buffer().element_size()
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    wrapped().backward()
    return sent[0], sum(parameter.numel() for parameter in trained)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and writes a row per config."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--configs", nargs="+", default=["severstal_lora", "severstal_full"], help="the last one is the reference"
    )
    add_out(parser, Path("runs/traffic.json"))
    args = parser.parse_args(argv)
    check_out(args)
    rows = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for config in args.configs:
            sent, trained = reduced_bytes(config)
            rows.append({"config": config, "bytes_per_step": sent, "params_trained": trained})
    finally:
        dist.destroy_process_group()
    for row in rows:
        row["share"] = row["bytes_per_step"] / rows[-1]["bytes_per_step"]
        shown = f"{row['bytes_per_step']:>15,} bytes a step"
        print(f"{row['config']:24} {shown}, {row['share']:8.3%} of {rows[-1]['config']}")
    write_result(args, rows)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
