"""Bytes saved for backward by the image encoder, eager and with SAM 2's own `compile_image_encoder: true`.

    python -m benchmarks.compiled [--case nano:128] [--methods full lean_fast lean] [--backend inductor]

No dispatch mode sees inside a compiled graph, so `benchmarks.train_step` cannot count it. Autograd's hooks do see the
tensors that the graph saves for backward. So this runs one forward pass of the image encoder on real tensors, one
image, under the CPU's bfloat16 autocast, and counts distinct storages without weights, image and outputs. Eager bytes
are those of live storages, which include the inputs of checkpoints. The saved tensors are chosen when forward and
backward are partitioned, before code is generated; the default backend stops there, and SAM 2's `inductor` uses the
same rule.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import gc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import LiveBytes, Saved
from benchmarks.methods import METHODS, build, make_batch
from benchmarks.output import add_out, check_out, write_result
from benchmarks.timing import apart
from benchmarks.train_step import parse_case

BACKENDS = ("aot_eager_decomp_partition", "inductor")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="nano:128", metavar="MODEL:RESOLUTION")
    parser.add_argument("--methods", nargs="+", default=("full", "lean_fast", "lean"), choices=METHODS)
    parser.add_argument("--backend", default=BACKENDS[0], choices=BACKENDS)
    add_out(parser, Path("runs/bench/compiled.json"))
    args = parser.parse_args(argv)
    check_out(args)
    place, rows = parse_case(args.case), []
    print(f"image encoder of {args.case}, {args.backend}")
    print("| method | MB kept, eager | MB kept, compiled |\n|---|---|---|")
    for method in args.methods:
        found = apart(kept_bytes, method, *place, args.backend)
        rows.append({"model": place[0], "resolution": place[1], "method": method, "backend": args.backend, **found})
        eager, compiled = (found[key] / 1e6 for key in ("eager_bytes", "compiled_bytes"))
        print(f"| {method} | {eager:,.2f} | {compiled:,.2f} ({compiled / eager:.2f}) |", flush=True)
        write_result(args, rows)
    print(f"written {args.out}")


def kept_bytes(method: str, size: str, resolution: int, backend: str) -> dict[str, int]:
    """`eager_bytes` and `compiled_bytes` that a method's image encoder saves for one image."""
    model = build(method, size, resolution).model
    encoder, image = model.image_encoder, make_batch(resolution).img_batch.flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        if hasattr(model, "hold_weights"):
            model.hold_weights("cpu")
        known = [*encoder.parameters(), *encoder.buffers(), image]
        drop(encoder(image))  # fills the caches of positions
        known += encoder.neck.position_encoding.cache.values()
        with LiveBytes(known) as live:
            outputs = encoder(image)
            gc.collect()
            eager = live.now - sum(storages(outputs, known).values())
        drop(outputs)
        compiled = torch.compile(encoder.forward, fullgraph=True, dynamic=False, backend=backend)
        drop(compiled(image))
        with Saved(known) as saved:
            outputs = compiled(image)
            found = saved.total - sum(size for key, size in storages(outputs, known).items() if key in saved.seen)
    return {"eager_bytes": eager, "compiled_bytes": found}


def storages(outputs: Mapping[str, Any], known: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the distinct storages of the encoder's maps and encodings, without those of `known`."""
    tensors = [outputs["vision_features"], *outputs["backbone_fpn"], *outputs["vision_pos_enc"]]
    left_out = {tensor.untyped_storage()._cdata for tensor in known}
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return {key: size for key, size in found.items() if key not in left_out}


def drop(outputs: dict[str, Any]) -> None:
    """Frees the outputs of a forward pass and their graph."""
    outputs.clear()
    gc.collect()


if __name__ == "__main__":
    run_cli(main)
