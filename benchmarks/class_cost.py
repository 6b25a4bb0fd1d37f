"""Counts what class prompts cost: their share of an inspection, and a class step compared with a click step.

    python -m benchmarks.class_cost [--sizes tiny large]

It runs on fake tensors, so no weights and no GPU are needed. An inspection is one tile: the image encoder once, and the
prompt encoder and mask decoder for all classes. A class step has as many objects as the click step: the four classes of
an image. With corrections it has as many predictions, too.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import training.model.sam2 as host
from torch import Tensor, nn

from benchmarks.counting import _counted
from benchmarks.fake import convert, fake_tensors
from benchmarks.kernels import Kernels
from benchmarks.methods import CONFIGS, Setup, build, make_batch, make_optimizer
from sam2_lora_ext.class_prompts.steps import ClassStep
from sam2_lora_ext.data.ids import class_prompt_id
from sam2_lora_ext.host.class_encoder import install_class_prompts
from sam2_lora_ext.inspection.network import ClassNetwork
from sam2_lora_ext.lora.class_tokens import ClassTokens
from sam2_lora_ext.model import LoRASAM2Train

CLASSES, TOKENS, RESOLUTION = 4, 8, 1024
KINDS = ("clicks", "classes", "corrected")


def with_tokens(method: str, size: str) -> Setup:
    """The setup of `benchmarks.methods`, with the tokens of four classes in the model."""
    setup = build(method, size, RESOLUTION)
    tokens = ClassTokens(torch.zeros(CLASSES, TOKENS, setup.model.sam_prompt_embed_dim), range(1, CLASSES + 1), "abcd")
    install_class_prompts(setup.model, tokens)
    return setup


def inspection(size: str) -> dict[str, int]:
    """FLOPs of a tile: of the image encoder (`encoder`), and of everything that the classes add (`classes`)."""
    network = ClassNetwork(with_tokens("lean", size).model.eval())
    model = network.model
    with fake_tensors() as mode, torch.no_grad():
        convert(network, mode)
        pixels = torch.zeros(1, 3, RESOLUTION, RESOLUTION)
        with Kernels() as whole:
            network(pixels)
        with Kernels() as encoder:
            model.image_encoder(pixels)
    return {"encoder": encoder.flops(), "classes": whole.flops() - encoder.flops()}


class Prompts:
    """Replaces the sampler of a batch: the tokens first, then fixed clicks, as in `benchmarks.fake`."""

    def __init__(self, model: nn.Module):
        self.first = None if model.class_step is None else model.class_step.prompt
        self.correcting = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block, the model takes its points from here."""
        click = host.get_next_point

        def point(gt_masks: Tensor, pred_masks: Tensor | None, method: str) -> tuple[Tensor, Tensor]:
            given = self.first is not None and not self.correcting
            return self.first if given else click(gt_masks, pred_masks, method)

        with mock.patch.object(host, "get_next_point", point):
            yield


def step(method: str, size: str, kind: str, images: int = 1) -> dict[str, Any]:
    """The `Cost` of a step of one of `KINDS`, with four objects an image, in bfloat16."""
    setup = with_tokens(method, size)

    def class_step(ids: Tensor, tokens: ClassTokens) -> ClassStep | None:
        if kind == "clicks":
            return None
        return ClassStep(tokens.prompt_of(torch.arange(CLASSES).repeat(images)), kind == "corrected")

    with (
        fake_tensors() as mode,
        mock.patch.object(ClassStep, "of", class_step),
        mock.patch.object(LoRASAM2Train, "_prompt_sampler", lambda self, input: Prompts(self)),
    ):
        convert(setup.model, mode)
        setup = setup._replace(optimizer=make_optimizer(setup.model, foreach=True))
        batch = make_batch(RESOLUTION, images, CLASSES)
        if kind != "clicks":
            ids = [class_prompt_id(c + 1, kind == "corrected") for c in range(CLASSES)] * images
            batch.metadata.unique_objects_identifier[..., 1] = torch.tensor(ids)
        cost, _ = _counted(setup, batch, True, lambda: None)
    return cost._asdict()


def main(argv: Sequence[str] | None = None) -> None:
    """Counts and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=CONFIGS, default=["tiny", "large"])
    parser.add_argument("--method", choices=("lean", "lean_fast", "lean_memory"), default="lean")
    args = parser.parse_args(argv)
    print("| model | encoder, GFLOP | four class prompts, GFLOP | share |\n|---|---|---|---|")
    for size in args.sizes:
        row = inspection(size)
        print(
            f"| {size} | {row['encoder'] / 1e9:.1f} | {row['classes'] / 1e9:.1f} | "
            f"{row['classes'] / row['encoder']:.2%} |",
            flush=True,
        )
    keys = ("flops", "kernels", "moved_bytes", "saved_bytes", "peak_live_bytes")
    print(f"\n| model | step | {' | '.join(keys)} | as a share of the click step |\n|---|---|{'---|' * 6}")
    for size in args.sizes:
        clicks = None
        for kind in KINDS:
            row = step(args.method, size, kind)
            clicks = clicks or row
            shares = " / ".join(f"{row[key] / clicks[key]:.3f}" for key in keys)
            print(f"| {size} | {kind} | {' | '.join(f'{row[key]:,}' for key in keys)} | {shares} |", flush=True)


if __name__ == "__main__":
    run_cli(main)
