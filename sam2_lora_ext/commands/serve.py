"""Serves a local page: click on a strip, see the masks of base and adapter side by side, save them as pre-labels.

The page works without a network, and only this machine can open it unless --host is set. Embeddings are cached, so a
click costs one decode. Windows, bits, orientation, resolution and classes are those of the run that contains the
adapter or the weights, of --run, or of a training config (-c).
"""

import argparse
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sam2_lora_ext.data.arguments import OVERRIDE, add_config, add_pixels, classes, source_of_model
from sam2_lora_ext.settings.arguments import COUNT, RESOLUTION, number
from sam2_lora_ext.settings.kinds import Whole
from sam2_lora_ext.utils.errors import UserError

EXAMPLES = """\
examples:
  a merged file compared with its base:
    python tools/serve.py --checkpoint steel.pt --compare sam2.1_hiera_tiny.pt --images strips
  a base with adapters to switch between on the page:
    python tools/serve.py --checkpoint sam2.1_hiera_tiny.pt --adapter line_1=runs/line_1 --adapter line_2=runs/line_2 \\
        --images strips
  for other machines, under the name gpu7 (everyone who can reach it can use it; safer: ssh -L):
    python tools/serve.py --checkpoint steel.pt --images strips --host 0.0.0.0 --name gpu7

The page's Save button writes kept masks as a data set to a folder in --out: coco, supervisely, label_png or kaggle.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("words", nargs="*", metavar="key=value", help=OVERRIDE)
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="merged (or any SAM 2) weights")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="a run, an adapter folder or a checkpoint on top of --checkpoint; may be repeated",
    )
    add("--compare", type=Path, action="append", default=[], metavar="FILE", help="more full weights to choose from")
    add("--config", metavar="NAME", help="the stock config (default: identified from the weights)")
    add("--images", type=Path, metavar="DIR", help="the strips (without it, drop images onto the page)")
    add("--out", type=Path, default=Path("prelabels"), metavar="DIR", help="the folder for data sets (%(default)s)")
    add("--run", type=Path, metavar="RUN", help="the run of the weights (default: the run that contains them)")
    add_config(options)
    add_pixels(options)
    add("--classes", type=classes, metavar="A,B,..|N=A,..", help="class names (default: the run's, else Severstal's)")
    add("--crop", type=number(COUNT), metavar="N", help="columns of the window around a click (default: the run's)")
    add("--image-size", type=number(RESOLUTION), metavar="PIXELS", help="of the model's input (default: the run's)")
    add("--device", metavar="NAME", help="cpu, cuda ... (default: cuda if there is one, else cpu)")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="the address to listen on (%(default)s)")
    add("--name", action="append", default=[], metavar="NAME", help="another host name by which browsers may open it")
    add("--port", type=number(Whole(0, 65535)), default=8000, metavar="N", help="0: a free one (%(default)s)")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the models, prints the address, serves until Ctrl-C or SIGTERM."""
    args = parser().parse_intermixed_args(argv)
    import torch

    from sam2_lora_ext.data.records import class_table

    try:
        import cachetools  # noqa: F401
        import fastapi  # noqa: F401
        import sam2  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs more packages ({error}): pip install -e '.[sam2,serve]'") from error
    from sam2_lora_ext.evaluate.models import check_device
    from sam2_lora_ext.serve.app import create_app
    from sam2_lora_ext.serve.classes import ClassPages
    from sam2_lora_ext.serve.engine import Engine
    from sam2_lora_ext.serve.guards import LOCAL
    from sam2_lora_ext.serve.images import Images
    from sam2_lora_ext.serve.labels import Labels
    from sam2_lora_ext.serve.models import load_models, named_adapters

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(args.device)
    adapters = named_adapters(args.adapter)
    source = source_of_model(args, next(iter(adapters.values()), args.checkpoint))
    bits, exif = (16, True) if source is None else (source.bits, source.exif)
    listening = listen(args.host, args.port)
    with listening, tempfile.TemporaryDirectory() as uploads:
        images = Images(args.images, uploads, args.bits or bits, exif and not args.as_stored)
        size = args.image_size or (source and source.resolution)
        loaded = load_models(
            args.checkpoint, adapters, args.compare, config=args.config, image_size=size, device=args.device
        )
        own = loaded.class_names or (source and source.class_names())
        table = class_table(args.classes or own or None)
        if missing := set(loaded.class_names) - set(table):
            raise UserError(f"--classes lacks class {min(missing)}, which a model's class prompts have")
        engine = Engine(loaded.models, images, args.crop or (source and source.crop))
        read = [*loaded.inputs, *([args.images] if args.images else [])]
        labels = Labels(images, table, args.out, read)
        pages = ClassPages(images, loaded.makers, engine.lock)
        app = create_app(engine, labels, pages, frozenset({*LOCAL, args.host.lower(), *map(str.lower, args.name)}))
        print(f"models   {', '.join(engine.models)} on {args.device}")
        seen = f"windows of {engine.crop} columns" if engine.crop else "whole strips"
        print(f"images   {len(images.paths)}, seen as {seen}")
        if args.host not in LOCAL:
            print(f"warning  everyone who can reach {args.host} can use the page and write to {args.out}")
        port = listening.getsockname()[1]
        shown = "localhost" if args.host in ("0.0.0.0", "::") else f"[{args.host}]" if ":" in args.host else args.host

        class Server(uvicorn.Server):
            """Prints the address as soon as the server responds."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                print(f"open     http://{shown}:{port}/   (stop with Ctrl-C)", flush=True)

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # containers send it; exiting removes dropped images
        try:
            Server(uvicorn.Config(app, log_level="warning", server_header=False)).run(sockets=[listening])
        finally:
            strips, masks = labels.count()
            print(f"kept     {masks} masks on {strips} strips{', not all of them saved' if labels.unsaved else ''}")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port fails before the models are loaded, as a `UserError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot listen on {host}:{port} ({why}): choose another --port or --host") from error
