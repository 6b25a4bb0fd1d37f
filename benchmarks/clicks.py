"""Measures the latency of a click on the page of `tools/serve.py`, from request to masks: `runs/bench/clicks.json`.

    python -m benchmarks.clicks                the small model, a base and an adapter, a strip of 1600x256

The client sends the page's requests to the real server at a loopback address. `open` encodes the strip for both models;
`click` requests the mask of one model, `pair` those of base and adapter, each at a new random point; `further` adds
clicks to earlier ones.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import http.client
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

from benchmarks.output import add_out, check_out, write_result
from sam2_lora_ext.adapters.peft import Adapter, save_adapter
from sam2_lora_ext.adapters.weights import write_weights
from sam2_lora_ext.data.records import class_table
from sam2_lora_ext.data.synthetic import write_strips
from sam2_lora_ext.deploy.stock import build_stock
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.serve.app import create_app
from sam2_lora_ext.serve.classes import ClassPages
from sam2_lora_ext.serve.engine import Engine
from sam2_lora_ext.serve.images import Images
from sam2_lora_ext.serve.labels import Labels
from sam2_lora_ext.serve.models import load_models
from sam2_lora_ext.settings.arguments import COUNT, RESOLUTION, number

ROOT = Path(__file__).resolve().parent.parent
GOAL = 150  # ms, of a click with the small model on a CPU


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes the latencies."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clicks", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/sam2_nano.yaml", help="a stock inference config (%(default)s)")
    parser.add_argument("--image-size", type=number(RESOLUTION), metavar="PIXELS", help="of the model's input")
    parser.add_argument("--rounds", type=number(COUNT), default=50, help="clicks of each kind (%(default)s)")
    parser.add_argument("--device", default="cpu", help="device of the models (%(default)s)")
    add_out(parser, ROOT / "runs/bench/clicks.json")
    args = parser.parse_args(argv)
    check_out(args)
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), args) as ask:
        rows = measure(ask, args.rounds)
    result = {
        "config": args.config,
        "image_size": args.image_size,
        "device": args.device,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "milliseconds": rows,
    }
    write_result(args, result)
    for name, row in rows.items():
        print(f"{name:8} median {row['median']:7.1f} ms   95 % within {row['p95']:7.1f} ms")
    print(f"(the goal is {GOAL} ms for a click with the small model on a CPU; {torch.get_num_threads()} threads)")
    print(f"written {args.out}")


def measure(ask: Callable[[str, Any], Any], rounds: int) -> dict[str, dict[str, float]]:
    """Medians and 95 % quantiles of the round trips in milliseconds."""
    places = random.Random(0)

    def click() -> list[float]:
        return [places.uniform(0, 1600), places.uniform(0, 256), 1]

    def timed(path: str, body: Any) -> float:
        began = time.perf_counter()
        ask(path, body)
        return 1e3 * (time.perf_counter() - began)

    found: dict[str, list[float]] = {name: [] for name in ("open", "click", "further", "pair")}
    found["open"] = [timed("/api/images/0/open", ["base", "adapter"])]
    ask("/api/predict", {"image": 0, "models": ["base", "adapter"], "clicks": [click()]})  # fills caches
    history: list[list[float]] = []
    for _ in range(rounds):
        found["click"].append(timed("/api/predict", {"image": 0, "models": ["adapter"], "clicks": [click()]}))
        found["pair"].append(timed("/api/predict", {"image": 0, "models": ["base", "adapter"], "clicks": [click()]}))
        history = [*history, click()] if len(history) < 8 else [click()]
        found["further"].append(timed("/api/predict", {"image": 0, "models": ["adapter"], "clicks": history}))
    return {
        name: {"median": statistics.median(values), "p95": sorted(values)[int(0.95 * (len(values) - 1))]}
        for name, values in found.items()
    }


@contextmanager
def serve(folder: Path, args: argparse.Namespace) -> Iterator[Callable[[str, Any], Any]]:
    """A server with a base and an adapter of random weights, and a function that sends requests."""
    torch.manual_seed(0)
    model = build_stock(args.config)
    write_weights(folder / "base.pt", model.state_dict())
    build_lora_model(model, {"rank": 8})
    save_adapter(Adapter.from_model(model, {}), folder / "adapter")
    write_strips(folder / "strips", 1, seed=1, clean_share=0, progress=False)
    (folder / "uploads").mkdir()
    images = Images(folder / "strips/train_images", folder / "uploads")
    loaded = load_models(
        folder / "base.pt",
        {"adapter": folder / "adapter"},
        config=args.config,
        image_size=args.image_size,
        device=args.device,
    )
    engine = Engine(loaded.models, images)
    labels = Labels(images, class_table(None), folder / "out")
    app = create_app(engine, labels, ClassPages(images, {}))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    connection = http.client.HTTPConnection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])

    def ask(path: str, body: Any) -> Any:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = json.loads(answer.read())
        if answer.status != 200:
            raise RuntimeError(found["detail"])
        return found

    try:
        yield ask
    finally:
        connection.close()
        server.should_exit = True
        thread.join(30)


if __name__ == "__main__":
    run_cli(main)
