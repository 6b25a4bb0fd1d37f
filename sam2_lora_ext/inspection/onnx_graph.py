"""Exports class prompts as one ONNX graph: pixels in, class logits and scores out, optionally masks.

    pixels (B, 3, S, S), RGB in [0, 1]  ->  logits (B, C, S/4, S/4), scores (B, C)
                                            with `decide`: masks uint8 (B, C, S/4, S/4) as well

B is dynamic. The masks apply thresholds, scale, bias and exclusive classes, tile by tile, but not minimum areas, since
ONNX has no connected components: remove small ones after the graph. Prompts are constants. float16 graphs keep float32
inputs and outputs. Legend: B tiles, C classes, S pixels of a side.
"""

import importlib
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam2_lora_ext.adapters.class_prompts import FACTS, ClassPrompts
from sam2_lora_ext.adapters.decision import Decision, calibrated, claim
from sam2_lora_ext.deploy.onnx_export import BOUND, PACKAGES, require_packages, session
from sam2_lora_ext.inspection.network import ClassNetwork
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, write_atomic, write_json

FILE, NOTES = "class_segmenter.onnx", "class_segmenter.json"
BATCHES = (1, 3)  # numbers of tiles in the comparison


@dataclass(frozen=True)
class GraphProof:
    """The comparison of the file under onnxruntime with PyTorch in float32.

    Args:
        max_abs_logit_diff: largest difference of a mask logit.
        max_abs_logit: largest absolute logit, for scale.
        max_abs_score_diff: largest difference of a presence score.
        max_abs_score: largest absolute score, for scale.
        flipped: share of the pixels of all classes whose logits have the other sign.
        mask_iou: IoU of the pixels above 0 in both.
        bound: allowed difference of logits; None for float16, whose error is `flipped` and `mask_iou`. Scores may
            differ by `BOUND` times the largest score or 1.
    """

    max_abs_logit_diff: float
    max_abs_logit: float
    max_abs_score_diff: float
    max_abs_score: float
    flipped: float
    mask_iou: float
    bound: float | None

    @property
    def passed(self) -> bool:
        """Whether the differences are within the bounds."""
        if self.bound is None:
            return True
        return self.max_abs_logit_diff <= self.bound and self.max_abs_score_diff <= BOUND * max(self.max_abs_score, 1)


class ClassGraph(nn.Module):
    """The module to trace: the network with constant prompts, and optionally the decision."""

    def __init__(self, network: ClassNetwork, decision: Decision | None):
        super().__init__()
        self.network, self.decision = network, decision
        with torch.no_grad():
            for name, value in zip(("sparse", "dense", "places"), network.prompt(), strict=True):
                self.register_buffer(name, value.clone())

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        logits, scores = self.network.answer(pixels, self.sparse, self.dense, self.places)
        if self.decision is None:
            return logits, scores
        present = scores >= torch.tensor(self.decision.threshold)
        masks = claim(calibrated(logits, self.decision), present, self.decision.exclusive)
        return logits, scores, masks.to(torch.uint8)


def export_classes(
    network: ClassNetwork,
    prompts: ClassPrompts,
    folder: Path,
    pixels: Tensor,
    facts: dict[str, Any],
    *,
    decide: bool = False,
    half: bool = False,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> GraphProof:
    """Writes class_segmenter.onnx and class_segmenter.json, if the comparison with PyTorch passes.

    Args:
        network: on the CPU.
        prompts: those of the network.
        folder: created if missing.
        pixels: the image of the comparison, RGB in [0, 1] (1, 3, S, S).
        facts: for the JSON file.
        decide: include the decision.
        half: compute in float16.
        force: replace files.
        report: called with a line about each stage.

    Raises:
        UserError: a package is missing, a file exists or cannot be written, or logits or scores differ too much.
    """
    require_packages()
    for name in (FILE, NOTES):
        refuse_existing(folder / name, force)
    graph = ClassGraph(network, prompts.decision if decide else None).eval().requires_grad_(False)
    outputs = ["logits", "scores", *(["masks"] if decide else [])]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            path = Path(made, FILE)
            report("tracing ...")
            _trace(graph, network.size, outputs, path)
            if half:
                _to_half(path)
            report("comparing with PyTorch ...")
            proof = prove(graph, path, pixels, None if half else BOUND)
            if not proof.passed:
                raise UserError(
                    f"the ONNX file differs from the model: logits by {proof.max_abs_logit_diff:.3g} "
                    f"({proof.bound:.3g} is allowed), scores by {proof.max_abs_score_diff:.3g} of "
                    f"{proof.max_abs_score:.3g}; nothing was written"
                )
            folder.mkdir(exist_ok=True)
            write_atomic(folder / FILE, lambda target: os.replace(path, target), force=force)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; check rights and disk space") from error
    write_json(
        folder / NOTES,
        {
            **facts,
            "inputs": {"pixels": "float32 (B, 3, S, S), RGB in [0, 1], a tile squashed to S x S"},
            "outputs": outputs,
            "float16": half,
            **{name: getattr(prompts, name) for name in FACTS},
            "decision": prompts.decision.as_dict(),
            "decision_inside": decide,
            "proof": asdict(proof),
            "versions": {name: importlib.import_module(name).__version__ for name in ("torch", *PACKAGES)},
        },
        force=force,
    )
    return proof


def prove(graph: ClassGraph, path: Path, pixels: Tensor, bound: float | None) -> GraphProof:
    """Compares the file with PyTorch on batches of several sizes, made of rotated copies of the image.

    Args:
        graph: in float32.
        path: of the file.
        pixels: (1, 3, S, S).
        bound: allowed difference of logits as a share of the largest; None for no bound.
    """
    runner = session(path)
    pairs = []
    for count in BATCHES:
        batch = torch.cat([pixels.rot90(turn, (2, 3)) for turn in range(count)])
        with torch.no_grad():
            pairs.append((graph(batch), runner.run(None, {"pixels": batch.numpy()})))
    wanted, found = (
        [torch.cat([torch.as_tensor(pair[side][place]).flatten() for pair in pairs]) for place in (0, 1)]
        for side in (0, 1)
    )
    largest = float(wanted[0].abs().max())
    ours, theirs = wanted[0] > 0, found[0] > 0
    union = int((ours | theirs).sum())
    return GraphProof(
        float((wanted[0] - found[0]).abs().max()),
        largest,
        float((wanted[1] - found[1]).abs().max()),
        float(wanted[1].abs().max()),
        float((ours != theirs).double().mean()),
        int((ours & theirs).sum()) / union if union else 1.0,
        None if bound is None else bound * largest,
    )


def _trace(graph: ClassGraph, size: int, outputs: list[str], path: Path) -> None:
    from torch.export import Dim

    # torch.export treats traced sizes of 0 and 1 as constants, so the example has two tiles
    example = torch.from_numpy(np.random.default_rng(0).random((2, 3, size, size), dtype=np.float32))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        torch.onnx.export(
            graph,
            (example,),
            path,
            input_names=["pixels"],
            output_names=outputs,
            dynamo=True,
            dynamic_shapes=[{0: Dim("tiles", min=1, max=1 << 12)}],
            external_data=False,
            verbose=False,
        )


def _to_half(path: Path) -> None:
    """Converts a file to float16, except inputs and outputs, with onnxruntime's own converter."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constants that float16 rounds to 0
        converted = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    onnx.save(converted, path)
