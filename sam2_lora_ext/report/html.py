"""Small pieces of HTML: escaped text, tables that scroll on narrow screens, embedded pictures, and the page's style."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import read_bytes

WIDE = 2.5  # width divided by height
LARGEST_PICTURE = 1 << 26  # bytes; browsers do not open pages with larger ones

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #5b6570; --line: #d9dee3; --panel: #f5f7f9;
  --good: #15803d; --bad: #b42318 }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --ink: #e6e9ec; --soft: #9aa5b0; --line: #343c44;
  --panel: #1d2329; --good: #5fd38a; --bad: #ff8f80 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: .3rem 0 } h1, p { overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem } p { margin: .4rem 0 } .soft, small { color: var(--soft) }
.scroll { overflow-x: auto; margin: .5rem 0 1rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
td { overflow-wrap: anywhere; min-width: 7rem } td.n { white-space: nowrap; min-width: 0 } th { font-weight: 600 }
thead th { overflow-wrap: anywhere } tbody th { position: sticky; left: 0; background: var(--paper);
  min-width: 7.5rem }
.plots, .pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 265px), 1fr)) } .wide { grid-column: span 2 }
@media (max-width: 640px) { .wide { grid-column: auto } }
figure { margin: 0; min-width: 0 } figcaption { font-size: 12px; color: var(--soft); overflow-wrap: anywhere }
img, svg { display: block; width: 100%; height: auto } .tall { max-width: 700px }
pre { background: var(--panel); padding: .7rem; font-size: 12.5px; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere }
.better { color: var(--good) } .worse { color: var(--bad) }
summary { cursor: pointer; margin: .3rem 0 }
"""


class Raw(str):
    """Text that is already HTML."""


def text(value: object) -> str:
    """A value as escaped text, unless it is `Raw`."""
    return value if isinstance(value, Raw) else escape(str(value))


def table(header: Sequence[object], rows: Sequence[Sequence[object]], wrap: bool = False) -> str:
    """A table whose first column names the row; with `wrap` long cells wrap, otherwise the table scrolls."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    opening = "<td>" if wrap else "<td class=n>"
    body = "".join(
        f"<tr><th>{text(row[0])}</th>{''.join(f'{opening}{text(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: str, body: str, unfolded: bool = False) -> str:
    """A collapsible part of the page."""
    return f"<details{' open' if unfolded else ''}><summary>{escape(title)}</summary>{body}</details>"


def picture(file: Path, caption: str) -> str:
    """A JPEG or PNG embedded in the page; a strip spans two columns of the grid.

    Raises:
        UserError: the file is missing or not a picture.
    """
    try:
        content = read_bytes(file, LARGEST_PICTURE)
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            kind, wide = image.format.lower(), image.width > WIDE * image.height
        data = base64.b64encode(content).decode("ascii")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {file} ({error}): evaluate again") from error
    source, words = f"data:image/{kind};base64,{data}", escape(caption)
    opening = '<figure class="wide">' if wide else "<figure>"
    return f'{opening}<img alt="{words}" src="{source}"><figcaption>{words}</figcaption></figure>'


def figure(svg: str) -> str:
    """A plot as a figure; empty for an empty plot."""
    return f"<figure>{svg}</figure>" if svg else ""


def page(title: str, body: str) -> str:
    """The whole page; it makes no network requests, not even for an icon."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
{body}
</body></html>
"""
