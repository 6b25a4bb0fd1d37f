"""For tests of the page: a nano base with two adapters on a few synthetic strips, and a client of the application."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starlette.testclient import TestClient

from helpers.stock_models import NANO, train_a_little
from sam2_lora_ext.adapters.peft import Adapter, save_adapter
from sam2_lora_ext.adapters.weights import read_weights, weights_id
from sam2_lora_ext.data.rle import decode_runs
from sam2_lora_ext.deploy.stock import build_stock
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.serve.app import create_app
from sam2_lora_ext.serve.classes import ClassPages, Inspector
from sam2_lora_ext.serve.engine import Engine
from sam2_lora_ext.serve.images import Images
from sam2_lora_ext.serve.labels import Labels
from sam2_lora_ext.serve.models import Loaded, load_models

BASE = Path(__file__).resolve().parents[2] / "assets/sam2_nano.pt"
CLASSES = {1: "patches", 2: "scratches", 4: "scale"}


def make_adapters(folder: Path) -> dict[str, Path]:
    """Two adapters of `BASE` that were moved by noise."""
    found = {}
    for seed, name in enumerate(("line_1", "line_2")):
        with torch.random.fork_rng([]):  # the same adapters, whatever ran before
            torch.manual_seed(seed)
            model = build_lora_model(build_stock(NANO, BASE), {"rank": 4})
        train_a_little(model, seed=seed)
        found[name] = folder / name
        save_adapter(Adapter.from_model(model, {"base_id": weights_id(read_weights(BASE))}), found[name])
    return found


@cache
def loaded_once(adapters: tuple[tuple[str, Path], ...]) -> Loaded:
    """The models of `BASE` and adapters, which no page changes: each request sets the adapter that it needs."""
    return load_models(BASE, dict(adapters))


class Page:
    """The application and its parts."""

    def __init__(
        self,
        folder: Path,
        images: Path | None,
        adapters: Mapping[str, Path],
        crop: int | None = None,
        makers: Mapping[str, Callable[[], Inspector]] | None = None,
    ):
        (folder / "uploads").mkdir(parents=True)
        self.out = folder / "out"
        self.images = Images(images, folder / "uploads")
        loaded = loaded_once(tuple(adapters.items()))
        self.engine = Engine(loaded.models, self.images, crop)
        self.labels = Labels(self.images, CLASSES, self.out, loaded.inputs + ([] if images is None else [images]))
        self.pages = ClassPages(self.images, makers or {}, self.engine.lock)
        self.app = create_app(self.engine, self.labels, self.pages)
        self.client = TestClient(self.app, base_url="http://localhost:8000")

    def post(self, path: str, body: Any) -> Any:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str, body: Any, status: int = 400) -> str:
        answer = self.client.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()["detail"]


def mask_of(runs: list[int], height: int, width: int) -> np.ndarray:
    """bool [H, W] of the page's flat runs."""
    return decode_runs(np.array(runs, dtype=np.int32).reshape(-1, 2), height, width) > 0
