"""Writes a stock SAM 2 as two ONNX files, proves them under onnxruntime against PyTorch, and times both.

Needs sam2 and the packages of the extra `onnx`. See `onnx_models.py` for the inputs and outputs of the files.
"""

import importlib
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam2_lora_ext.deploy.onnx_models import FEATURES, INPUTS, OUTPUTS, ImageHalf, PromptHalf, example_inputs
from sam2_lora_ext.deploy.stock import PROMPTS, mask_logits, normalised
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_atomic, write_json

HALVES = {"image_encoder": ImageHalf, "mask_decoder": PromptHalf}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FACTS = "export.json"
BOUND = 1e-4  # share of the largest logit: other kernels add in another order, some 1e-6 for each of dozens of layers
TIMED, ENOUGH = 5, 10.0  # runs, after one that is not counted; no further one after so many seconds


@dataclass
class Proof:
    """The ONNX files against PyTorch.

    Attributes:
        max_abs_logit_diff: largest difference of a mask logit, over all prompts and mask outputs.
        max_abs_logit: largest logit, for scale.
        flipped: share of mask pixels that changed side.
        bound: what `max_abs_logit_diff` may be.
        seconds: median by half ("image_encoder"; "mask_decoder" for one click) and runtime ("pytorch", "onnxruntime").
    """

    max_abs_logit_diff: float
    max_abs_logit: float
    flipped: float
    bound: float
    seconds: dict[str, dict[str, float]]

    @property
    def passed(self) -> bool:
        """Whether the files are the model."""
        return self.max_abs_logit_diff <= self.bound  # False for NaN


def require_packages() -> None:
    """Raises a `UserError` that says what to install when a package of the extra `onnx` is missing."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"the export needs {', '.join(PACKAGES)} ({error}): pip install -e '.[onnx]'") from error


def check_output(folder: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raises a `UserError` when the folder cannot take the files, has some and `force` is off, or they are `inputs`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: --out names the folder of the ONNX files")
    for name in (*(f"{half}.onnx" for half in HALVES), FACTS):
        refuse_existing(folder / name, force)
        refuse_input_files(folder / name, inputs)


def export(
    model: nn.Module,
    folder: str | Path,
    pixels: Tensor,
    facts: dict[str, Any],
    *,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Proof:
    """Writes image_encoder.onnx, mask_decoder.onnx and export.json; nothing is written unless the proof passes.

    Args:
        model: a stock SAM 2 on the CPU, see `build_stock`.
        folder: made when missing.
        pixels: what the files are proven on, RGB in [0, 1] (1, 3, S, S); it decides nothing else.
        facts: for export.json, beside what this function knows.
        force: replace files that are there.
        report: called with a line about each stage.

    Raises:
        UserError: a package is missing, a file exists, the masks differ by more than the bound, or the system refuses.
    """
    folder = Path(folder)
    require_packages()
    check_output(folder, force)
    model = model.eval().requires_grad_(False)
    examples = example_inputs(model, pixels)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            for name, half in HALVES.items():
                report(f"tracing {name} ...")
                _write(half(model).eval(), name, examples[name], Path(made, f"{name}.onnx"))
            report("comparing with PyTorch ...")
            proof = prove(model, Path(made), pixels)
            if not proof.passed:
                raise UserError(
                    "the ONNX files are not the model: their mask logits differ by "
                    f"{proof.max_abs_logit_diff:.3g}, and {proof.bound:.3g} is allowed; none was written"
                )
            folder.mkdir(exist_ok=True)
            for name in HALVES:
                file = f"{name}.onnx"
                write_atomic(folder / file, lambda path, file=file: os.replace(Path(made, file), path), force=force)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; check rights and free disk") from error
    write_json(
        folder / FACTS,
        {
            **facts,
            "image_size": pixels.shape[-1],
            "inputs": INPUTS,
            "outputs": OUTPUTS,
            "proof": asdict(proof),
            "versions": {name: importlib.import_module(name).__version__ for name in ("torch", *PACKAGES)},
        },
        force=force,
    )
    return proof


def prove(model: nn.Module, folder: Path, pixels: Tensor) -> Proof:
    """Runs all `PROMPTS` through the files, each alone and those of one point together, against stock SAM 2."""
    size = pixels.shape[-1]
    encoder, decoder = (session(folder / f"{name}.onnx") for name in HALVES)
    features = dict(zip(FEATURES, encoder.run(None, {"pixels": pixels.numpy()})))

    def masks(coords: list[list[tuple[float, float]]], labels: list[list[int]]) -> Tensor:
        prompt = {"point_coords": np.float32(coords) * size, "point_labels": np.int64(labels)}
        return torch.from_numpy(decoder.run(["masks"], {**features, **prompt})[0])

    with torch.no_grad():
        expected = mask_logits(model, normalised(pixels))
        single = [index for index, (points, _) in enumerate(PROMPTS) if len(points) == 1]
        found = torch.cat(
            [
                *(masks([points], [labels]) for points, labels in PROMPTS),
                masks([PROMPTS[index][0] for index in single], [PROMPTS[index][1] for index in single]),
            ]
        )
        expected = torch.cat([expected, expected[single]])
        image_half, prompt_half = (half(model).eval() for half in HALVES.values())
        tensors = image_half(pixels)
        coords, labels = torch.tensor([[[0.5, 0.5]]]) * size, torch.tensor([[1]])
        click = {**features, "point_coords": coords.numpy(), "point_labels": labels.numpy()}
        seconds = {
            "image_encoder": {
                "pytorch": _median_seconds(lambda: image_half(pixels)),
                "onnxruntime": _median_seconds(lambda: encoder.run(None, {"pixels": pixels.numpy()})),
            },
            "mask_decoder": {
                "pytorch": _median_seconds(lambda: prompt_half(*tensors, coords, labels)),
                "onnxruntime": _median_seconds(lambda: decoder.run(None, click)),
            },
        }
    largest = float(expected.abs().max())
    return Proof(
        float((found - expected).abs().max()),
        largest,
        float(((found > 0) != (expected > 0)).double().mean()),
        BOUND * largest,
        seconds,
    )


def session(path: Path) -> Any:
    """An onnxruntime session on the CPU, with as many threads as PyTorch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _write(half: nn.Module, name: str, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Traces one half into one file; the numbers of prompts and of points stay open."""
    from torch.export import Dim

    # torch.export takes sizes of 0 and 1 for constants where they are traced, so the examples have others
    open_sizes = {0: Dim("prompts", min=1, max=1 << 16), 1: Dim("points", min=1, max=1 << 16)}
    shapes = [open_sizes if key.startswith("point_") else None for key in INPUTS[name]]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own names and internals
        torch.onnx.export(
            half,
            inputs,
            path,
            input_names=INPUTS[name],
            output_names=OUTPUTS[name],
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )


def _median_seconds(run: Callable[[], Any]) -> float:
    run()
    seconds: list[float] = []
    while len(seconds) < TIMED and sum(seconds) < ENOUGH:
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
