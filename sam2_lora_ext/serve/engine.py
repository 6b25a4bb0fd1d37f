"""Predicts masks of clicks and boxes with every model on the page; embeddings are cached, so a click costs one decode.

Prompts are used as in SAM: the first click takes the best of three masks, and each further click also gets the
low-resolution logits of the previous mask. Legend: H W pixels of the strip, w window width, h side of the
low-resolution logits. Coordinates are (x, y) in pixels of the strip.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

from sam2_lora_ext.data.rle import encode_mask
from sam2_lora_ext.data.tiles import tile_starts
from sam2_lora_ext.evaluate.predictor import make_predictor
from sam2_lora_ext.lora.live import set_adapter
from sam2_lora_ext.serve.images import Images
from sam2_lora_ext.utils.errors import UserError

EMBEDDED = 2 << 30  # bytes of cached image embeddings: about 128 images at 1024 pixels
ANSWERED = 256 << 20  # bytes of cached low-resolution logits
MOST_CLICKS = 64


@dataclass(frozen=True)
class Model:
    """A choice on the page: a network with one of its adapters, or without any.

    Args:
        name: on the page.
        network: in eval mode, from `load_sam2`.
        adapter: name of the network's adapter; None is the base.
        path: of its weights, for class prompts.
    """

    name: str
    network: SAM2Base
    adapter: str | None
    path: Path


@dataclass(frozen=True)
class Prompts:
    """Clicks, a box, or both.

    Args:
        clicks: (x, y, label) in the order of the clicks, with label 1 on the object and 0 outside it.
        box: (x0, y0, x1, y1), or None.
        whole: the model sees the whole strip, not a window of it.
    """

    clicks: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, float, float, float] | None = None
    whole: bool = False

    def check(self, height: int, width: int) -> None:
        """Raises a `UserError` for prompts that are invalid on a strip of this size."""
        if not self.clicks and self.box is None:
            raise UserError("there is no prompt: click on the strip or drag a box")
        if len(self.clicks) > MOST_CLICKS:
            raise UserError(f"there may be at most {MOST_CLICKS} clicks, got {len(self.clicks)}")
        corners = [] if self.box is None else [self.box[:2], self.box[2:]]
        for x, y in [*(click[:2] for click in self.clicks), *corners]:
            if not (0 <= x <= width and 0 <= y <= height):  # False for NaN
                raise UserError(f"({x:g}, {y:g}) is outside the strip of {width}x{height} pixels")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise UserError(f"a box must have x0 < x1 and y0 < y1, got {self.box}")


@dataclass(frozen=True)
class Answer:
    """One model's mask.

    Attributes:
        runs: int32 [R, 2] of (start, length), column-major from 0, on the strip.
        area: in pixels.
        score: predicted IoU.
        window: [start, stop) columns that the model saw.
        encode_ms: time of the image encoder; 0 if the embedding was cached.
        decode_ms: time of prompt encoder and mask decoder, including the mask at the strip's size.
    """

    runs: np.ndarray
    area: int
    score: float
    window: tuple[int, int]
    encode_ms: float
    decode_ms: float


class Engine:
    """The models of the page; one request at a time, since adapters are switched in place.

    Args:
        models: at least one, with distinct names.
        images: to click on.
        crop: columns of the window that the models were trained on; None for whole strips.
    """

    def __init__(self, models: Sequence[Model], images: Images, crop: int | None = None):
        self.models = {model.name: model for model in models}
        self.images, self.crop, self.lock = images, crop, threading.RLock()
        self._embedded: LRUCache = LRUCache(EMBEDDED, getsizeof=embedding_bytes)
        self._low: LRUCache = LRUCache(ANSWERED, getsizeof=lambda low: low.nbytes)

    def model(self, name: str) -> Model:
        """The model of this name; if there is none, a `UserError` lists the names."""
        if name not in self.models:
            raise UserError(f"there is no model {name[:100]!r}: choose from {', '.join(map(repr, self.models))}")
        return self.models[name]

    @torch.inference_mode()
    def answer(self, image: int, name: str, prompts: Prompts) -> Answer:
        """The mask of one model; raises `UserError` if the image or model does not exist or the prompts are invalid."""
        model, pixels = self.model(name), self.images.read(image)
        prompts.check(*pixels.shape[:2])
        window = self.window(pixels.shape[1], prompts)
        with self.lock:
            set_adapter(model.network, model.adapter)
            predictor, encode_ms = self._predictor(image, model, pixels, window)
            began = time.perf_counter()
            logits, score = self._steps(image, model, predictor, prompts, window)
            mask = np.zeros(pixels.shape[:2], dtype=bool)
            mask[:, slice(*window)] = logits > 0
            runs = encode_mask(mask)
        decode_ms = 1e3 * (time.perf_counter() - began)
        return Answer(runs, int(runs[:, 1].sum()), score, window, encode_ms, decode_ms)

    @torch.inference_mode()
    def encode(self, image: int, name: str) -> float:
        """Encodes a whole strip before the first click, unless models see windows; returns the milliseconds."""
        model, pixels = self.model(name), self.images.read(image)
        if self.crop is not None and self.crop < pixels.shape[1]:
            return 0.0
        with self.lock:
            set_adapter(model.network, model.adapter)
            return self._predictor(image, model, pixels, (0, pixels.shape[1]))[1]

    def window(self, width: int, prompts: Prompts) -> tuple[int, int]:
        """[start, stop) columns that a model sees: the most central window that contains all prompts, or the whole
        strip if none does."""
        if prompts.whole or self.crop is None or self.crop >= width:
            return 0, width
        columns = [x for x, _, _ in prompts.clicks] + ([] if prompts.box is None else [prompts.box[0], prompts.box[2]])
        low, high = min(columns), max(columns)
        starts = tile_starts(width, self.crop, self.crop // 2)
        holding = [start for start in starts if start <= low and high <= start + self.crop]
        if not holding:
            return 0, width
        start = min(holding, key=lambda start: abs(2 * start + self.crop - low - high))
        return start, start + self.crop

    def _predictor(
        self, image: int, model: Model, pixels: np.ndarray, window: tuple[int, int]
    ) -> tuple[SAM2ImagePredictor, float]:
        """A predictor with the embedding of a window, and the milliseconds of encoding, 0 if it was cached."""
        key = (image, model.name, window)
        if key in self._embedded:
            return self._embedded[key], 0.0
        began = time.perf_counter()
        predictor = make_predictor(model.network)
        predictor.set_image(np.ascontiguousarray(pixels[:, slice(*window)]))
        if embedding_bytes(predictor) <= EMBEDDED:
            self._embedded[key] = predictor
        return predictor, 1e3 * (time.perf_counter() - began)

    def _steps(
        self, image: int, model: Model, predictor: SAM2ImagePredictor, prompts: Prompts, window: tuple[int, int]
    ) -> tuple[np.ndarray, float]:
        """Logits [H, w] and predicted IoU after the last prompt; steps with cached logits are not decoded again."""
        first = 0 if prompts.box is not None else 1
        known = [(image, model.name, window, prompts.box, prompts.clicks[:n]) for n in range(len(prompts.clicks) + 1)]
        done = next((n for n in range(len(prompts.clicks) - 1, first - 1, -1) if known[n] in self._low), None)
        low = None if done is None else self._low[known[done]]
        for n in range(first if done is None else done + 1, len(prompts.clicks) + 1):
            asked = self._asked(prompts.clicks[:n], prompts.box, window[0])
            single = low is not None or prompts.box is not None
            masks, scores, lows = predictor.predict(
                **asked, mask_input=low, multimask_output=not single, return_logits=True
            )
            best = int(scores.argmax())
            low = self._low[known[n]] = lows[best][None]
        return masks[best], float(scores[best])

    @staticmethod
    def _asked(clicks: Sequence[tuple[float, float, int]], box: Sequence[float] | None, start: int) -> dict[str, Any]:
        """Arguments of `SAM2ImagePredictor.predict`, in pixels of the window."""
        asked: dict[str, Any] = {"box": None if box is None else np.array(box, np.float32) - [start, 0, start, 0]}
        if clicks:
            columns = np.array(clicks, dtype=np.float32)
            asked |= {"point_coords": columns[:, :2] - [start, 0], "point_labels": columns[:, 2].astype(np.int32)}
        return asked


def embedding_bytes(predictor: SAM2ImagePredictor) -> int:
    """Bytes of a predictor's image features."""
    features = predictor._features
    return sum(map_.nbytes for map_ in (features["image_embed"], *features["high_res_feats"]))
