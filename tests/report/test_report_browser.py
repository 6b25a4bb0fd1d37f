"""The report in a headless browser: no console error, all pictures load, nothing too wide, light and dark."""

import json
import re

import pytest
from PIL import Image

from helpers.browsing import browse, chromium  # noqa: F401
from helpers.reported_run import page, run  # noqa: F401

PROBE = """<script>addEventListener("load", () => { document.documentElement.dataset.probe = JSON.stringify({
  broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).length,
  images: document.images.length,
  wide: document.documentElement.scrollWidth - innerWidth, background: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color, plots: [...document.querySelectorAll("svg")]
    .map(svg => svg.getBoundingClientRect().height) }) })</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [500, 1200])  # no window is narrower than 500 here; 390 is the inner frame below
def test_in_a_browser(chromium, page, tmp_path, width, dark):
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", PROBE + "</body>"))
    look = [f"--window-size={width},1200"] + (
        ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    )
    done = browse(chromium, file, *look, "--virtual-time-budget=5000", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    probe = json.loads(re.search(r'data-probe="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert probe["images"] == page.count("<img ") and probe["broken"] == 0
    assert probe["wide"] <= 0 and all(height > 100 for height in probe["plots"])
    assert probe["background"] == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")
    shot = tmp_path / "shot.png"
    browse(chromium, file, *look, f"--screenshot={shot}")
    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    assert image.size[0] == width and len(colours) > 50  # not blank
    assert max(colours)[1] == ((20, 24, 28) if dark else (255, 255, 255))


@pytest.mark.browser
def test_on_a_phone(chromium, page, tmp_path):
    (tmp_path / "page.html").write_text(
        page.replace(
            "</body>", PROBE.replace("document.documentElement.dataset.probe =", "parent.document.title =") + "</body>"
        )
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<!doctype html><title></title><iframe src="page.html" width="390" height="800" style="border: 0"></iframe>'
    )
    done = browse(chromium, frame, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
    probe = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert probe["wide"] <= 0 and probe["broken"] == 0
