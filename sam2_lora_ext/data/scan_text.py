"""One HTML page about a scanned data set: counts, problems, and a contact sheet of overlays, in one file."""

import base64
import html
import io
import itertools
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam2_lora_ext.data.index import AnnotationIndex
from sam2_lora_ext.data.rle import decode_runs
from sam2_lora_ext.data.scan import class_sets, combination
from sam2_lora_ext.utils.errors import UserError

COLORS = ((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 49), (145, 30, 180))
SHEET = 48  # images on the sheet
WIDTH = 560  # of one, in pixels
LISTED = 200  # problems and groups of duplicates on the page

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222 }
h1, p, li { overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 0 0 1.5em; display: block; overflow-x: auto }
td, th { padding: 2px 12px 2px 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); gap: 12px }
figure { margin: 0 } img { width: 100%; display: block }
figcaption { font-size: 12px; color: #555; overflow-wrap: anywhere }
.key { display: inline-block; width: 1em; height: 1em; vertical-align: -2px; margin-right: 4px }
"""


def overlay(index: AnnotationIndex, image: int, bits: int = 16) -> Image.Image:
    """An image with its masks tinted in the colour of their class; `bits` as in `images.read_rgb`."""
    pixels = index.read(image, bits).copy()
    for class_id, runs in index.masks(image):
        mask = decode_runs(runs, *index.sizes[image].tolist()) > 0
        pixels[mask] = (pixels[mask] * 0.55 + np.array(color(class_id)) * 0.45).astype(np.uint8)
    return Image.fromarray(pixels)


def color(class_id: int) -> tuple[int, int, int]:
    """The colour of a class."""
    return COLORS[(class_id - 1) % len(COLORS)]


def choose(index: AnnotationIndex, count: int = SHEET) -> list[int]:
    """Images for the sheet: each combination of classes in turn, so that rare ones appear too."""
    waiting: dict[str, list[int]] = {}
    for image, classes in enumerate(class_sets(index)):
        waiting.setdefault(combination(classes), []).append(image)
    for images in waiting.values():  # in the order of a hash, since neighbours in name order are often similar
        images.sort(key=lambda image: zlib.crc32(index.name(image).encode("utf-8", "surrogateescape")))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*(waiting[label] for label in sorted(waiting))))
    return sorted(itertools.islice((image for image in turns if image is not None), count))


def render(index: AnnotationIndex, summary: Mapping[str, Any], bits: int = 16) -> str:
    """The page; `bits` as in `images.read_rgb`."""
    rows = [
        ("images", summary["images"]),
        ("clean", f"{summary['clean']} ({summary['clean_share']:.1%})"),
        ("unknown", f"{summary['unknown']} (could not be read: neither defective nor clean)"),
        ("may lack masks", len(summary["may_lack_masks"])),
        ("masks (image, class)", summary["masks"]),
        (f"objects ({summary['objects_are']})", summary["objects"]),
        *_annotation_rows(summary["annotations"]),
        ("sizes", _counts(summary["sizes"])),
        ("modes", _counts(summary["modes"])),
        ("with an orientation tag", summary["turned"]),
        ("units", "; ".join(summary["units"]) or "nothing odd"),
        ("unexposed columns", f"mean {summary['black_share']['mean']:.1%}, max {summary['black_share']['max']:.1%}"),
        (
            "duplicates",
            f"{len(summary['duplicates']['exact'])} groups exactly the same "
            f"({len(summary['duplicates']['exact_with_other_masks'])} with different masks), "
            f"{len(summary['duplicates']['near'])} nearly",
        ),
        ("not read", f"{len(summary['unread'])} files and folders"),
        ("problems", _counts(summary["problems_per_cause"]) or "none"),
    ]
    facts = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows)
    classes = "".join(_class_row(number, name, summary) for number, name in summary["class_names"].items())
    mixes = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{count}</td></tr>"
        for name, count in sorted(summary["combinations"].items(), key=lambda item: -item[1])
    )
    figures = "".join(_figure(index, image, bits) for image in choose(index))
    problems = _list(
        [
            f"{p['file']}{'' if p['row'] is None else ', row ' + str(p['row'])}: {p['sentence']}"
            for p in summary["problems"]
        ]
    )
    notes = _list([*summary["notes"], *(f"not read: {path}" for path in summary["unread"])])
    near = _list([", ".join(names) for names in summary["duplicates"]["near"]])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(index.image_dir)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(Path(index.image_dir).name)}</h1>
<p>{html.escape(index.image_dir)}</p>
<table>{facts}</table>
<h2>Classes</h2>
<table>
<tr><th>class</th><th>masks</th><th>objects</th><th>object area in pixels: smallest, median, largest</th></tr>
{classes}</table>
<h2>Combinations</h2>
<table>{mixes}</table>
<h2>Images</h2>
<div class="sheet">{figures}</div>
<h2>Problems</h2>
{problems}
<h2>Notes</h2>
{notes}
<h2>Same or nearly the same</h2>
{near}
</body></html>
"""


def _annotation_rows(counts: Mapping[str, int] | None) -> list[tuple[str, str]]:
    """How components would change the annotations of a format with instances."""
    if counts is None:
        return []
    joined, split = counts["joined_by_components"], counts["split_by_components"]
    return [("annotations", f"{counts['count']} (components would join {joined} and split {split} of them)")]


def _class_row(number: str, name: str, summary: Mapping[str, Any]) -> str:
    area = summary["object_area"][number]
    spread = " / ".join(f"{area[key]:.0f}" for key in ("min", "median", "max")) if area else ""
    key = f'<span class="key" style="background: rgb{color(int(number))}"></span>'
    return (
        f"<tr><td>{key}{number} {html.escape(name)}</td><td class=n>{summary['masks_per_class'][number]}</td>"
        f"<td class=n>{summary['objects_per_class'][number]}</td><td>{spread}</td></tr>"
    )


def _figure(index: AnnotationIndex, image: int, bits: int) -> str:
    classes = tuple(sorted({class_id for class_id, _ in index.masks(image)}))
    caption = f"{index.name(image)}: {combination(classes)}"
    try:
        picture = overlay(index, image, bits)
    except UserError as error:
        return f"<figure><figcaption>{html.escape(f'{caption}: {error}')}</figcaption></figure>"
    picture.thumbnail((WIDTH, WIDTH))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    picture_tag = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{picture_tag}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def _list(lines: list[str]) -> str:
    if not lines:
        return "<p>None.</p>"
    more = f"<p>... and {len(lines) - LISTED} more in scan.json</p>" if len(lines) > LISTED else ""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines[:LISTED]) + f"</ul>{more}"
