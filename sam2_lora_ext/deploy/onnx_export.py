"""Writes a stock SAM 2 as two ONNX files, compares onnxruntime's results with PyTorch's, and times both.

Needs sam2 and the packages of the extra `onnx`. See `onnx_layouts.py` for the inputs and outputs of the files.
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

from sam2_lora_ext.deploy.onnx_layouts import FEATURES, LAYOUTS, PAIR, Layout, configs_of_others
from sam2_lora_ext.deploy.stock import PROMPTS, mask_logits, normalised
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_atomic, write_json

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FACTS = "export.json"
BOUND = 1e-4  # share of the largest logit; kernels differ in order of summation, about 1e-6 per layer
TIMED, ENOUGH = 5, 10.0  # number of timed runs after a warm-up run; no further run starts after so many seconds


@dataclass
class Proof:
    """The comparison of the ONNX files with PyTorch.

    Attributes:
        max_abs_logit_diff: largest difference of a mask logit, over all prompts and mask outputs.
        max_abs_logit: largest logit, for scale.
        flipped: share of mask pixels whose logit changed sign.
        bound: largest allowed `max_abs_logit_diff`.
        seconds: median by half ("image_encoder"; "mask_decoder" for one click) and runtime ("pytorch", "onnxruntime").
    """

    max_abs_logit_diff: float
    max_abs_logit: float
    flipped: float
    bound: float
    seconds: dict[str, dict[str, float]]

    @property
    def passed(self) -> bool:
        """Whether the difference is within the bound."""
        return self.max_abs_logit_diff <= self.bound  # False for NaN


def require_packages() -> None:
    """Raises a `UserError` with the install command when a package of the extra `onnx` is missing."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"the export needs {', '.join(PACKAGES)} ({error}): pip install -e '.[onnx]'") from error


def check_output(folder: Path, force: bool, inputs: Iterable[Path] = (), layout: str = "plain") -> None:
    """Raises a `UserError` when the files cannot be written: they exist and `force` is off, or they are `inputs`.

    It also refuses a folder with a labelling tool's config file of another layout, which would not fit the new files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give --out the folder for the ONNX files")
    for name in configs_of_others(LAYOUTS[layout]):
        if (folder / name).exists():
            raise UserError(
                f"{folder / name} belongs to ONNX files of another layout: choose a folder other than {folder}"
            )
    for name in (*(f"{half}.onnx" for half in PAIR), FACTS, *LAYOUTS[layout].configs):
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
    layout: str = "plain",
    name: str = "sam2",
) -> Proof:
    """Writes image_encoder.onnx, mask_decoder.onnx, export.json and the layout's config files.

    Nothing is written unless the comparison passes.

    Args:
        model: a stock SAM 2 on the CPU, see `build_stock`.
        folder: created if missing.
        pixels: the image of the comparison, RGB in [0, 1] (1, 3, S, S).
        facts: further entries of export.json.
        force: replace existing files.
        report: called with a line about each stage.
        layout: a key of `LAYOUTS`.
        name: the model's name in a labelling tool.

    Raises:
        UserError: a package is missing, a file exists or cannot be written, or the masks differ by more than the bound.
    """
    folder = Path(folder)
    require_packages()
    check_output(folder, force, layout=layout)
    chosen = LAYOUTS[layout]
    model = model.eval().requires_grad_(False)
    examples = chosen.examples(model, pixels)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            for half, module in chosen.halves.items():
                report(f"tracing {half} ...")
                _write(module(model).eval(), chosen, half, examples[half], Path(made, f"{half}.onnx"))
            report("comparing with PyTorch ...")
            proof = prove(model, Path(made), pixels, layout)
            if not proof.passed:
                raise UserError(
                    "the ONNX files differ from the model: their mask logits differ by "
                    f"{proof.max_abs_logit_diff:.3g}, but only {proof.bound:.3g} is allowed; nothing was written"
                )
            folder.mkdir(exist_ok=True)
            for file in (f"{half}.onnx" for half in PAIR):
                write_atomic(folder / file, lambda path, file=file: os.replace(Path(made, file), path), force=force)
            for file, text in chosen.configs.items():
                config = text(name, pixels.shape[-1])
                write_atomic(folder / file, lambda path, config=config: path.write_text(config), force=force)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; check rights and free disk") from error
    write_json(
        folder / FACTS,
        {
            **facts,
            "layout": layout,
            "image_size": pixels.shape[-1],
            "inputs": chosen.inputs,
            "outputs": chosen.outputs,
            "proof": asdict(proof),
            "versions": {name: importlib.import_module(name).__version__ for name in ("torch", *PACKAGES)},
        },
        force=force,
    )
    return proof


def prove(model: nn.Module, folder: Path, pixels: Tensor, layout: str = "plain") -> Proof:
    """Compares the files with stock SAM 2 on all `PROMPTS`, each alone, and those of one point as a batch."""
    size, chosen = pixels.shape[-1], LAYOUTS[layout]
    encoder, decoder = (session(folder / f"{name}.onnx") for name in PAIR)
    image = dict(zip(chosen.inputs["image_encoder"], (chosen.image(pixels),)))
    features = dict(zip(chosen.outputs["image_encoder"], encoder.run(None, _arrays(image))))

    def prompt(coords: list[list[tuple[float, float]]], labels: list[list[int]]) -> dict[str, Tensor]:
        tensors = chosen.prompt(torch.tensor(coords) * size, torch.tensor(labels), size)
        return dict(zip(chosen.inputs["mask_decoder"][len(FEATURES) :], tensors, strict=True))

    def masks(coords: list[list[tuple[float, float]]], labels: list[list[int]]) -> Tensor:
        return torch.from_numpy(decoder.run(["masks"], {**features, **_arrays(prompt(coords, labels))})[0])

    with torch.no_grad():
        expected = mask_logits(model, normalised(pixels))[:, chosen.masks]
        single = [index for index, (points, _) in enumerate(PROMPTS) if len(points) == 1]
        found = torch.cat(
            [
                *(masks([points], [labels]) for points, labels in PROMPTS),
                masks([PROMPTS[index][0] for index in single], [PROMPTS[index][1] for index in single]),
            ]
        )
        expected = torch.cat([expected, expected[single]])
        halves = {name: half(model).eval() for name, half in chosen.halves.items()}
        tensors = dict(zip(chosen.outputs["image_encoder"], halves["image_encoder"](*image.values())))
        click = prompt([[(0.5, 0.5)]], [[1]])
        inputs = {"image_encoder": image, "mask_decoder": {**{key: tensors[key] for key in FEATURES}, **click}}
        seconds = {
            name: {
                "pytorch": _median_seconds(lambda name=name: halves[name](*inputs[name].values())),
                "onnxruntime": _median_seconds(lambda name=name, run=run: run(None, _arrays(inputs[name]))),
            }
            for name, run in zip(PAIR, (encoder.run, decoder.run))
        }
    largest = float(expected.abs().max())
    return Proof(
        float((found - expected).abs().max()),
        largest,
        float(((found > 0) != (expected > 0)).double().mean()),
        BOUND * largest,
        seconds,
    )


def _arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def session(path: Path) -> Any:
    """An onnxruntime session on the CPU, with as many threads as PyTorch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _write(half: nn.Module, layout: Layout, name: str, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Traces one half into one file; the numbers of prompts and points are dynamic."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the exporter about its own names and internals
        torch.onnx.export(
            half,
            inputs,
            path,
            input_names=layout.inputs[name],
            output_names=layout.outputs[name],
            dynamo=True,
            dynamic_shapes=layout.open_sizes(name),
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
