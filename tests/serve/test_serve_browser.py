"""The page in headless Chromium, with real clicks, drags and taps: on desktop and phone, light and dark."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from PIL import Image

from helpers.browsing import chromium  # noqa: F401
from helpers.chrome import DESK, PHONE, Tab, open_tab
from helpers.serve_pages import Page, make_adapters, mask_of
from sam2_lora_ext.serve.classes import Inspector
from sam2_lora_ext.serve.engine import Prompts

pytestmark = pytest.mark.browser
PAPER = {False: (255, 255, 255), True: (20, 24, 28)}
FACTS = "[...document.querySelectorAll('.facts')].map(one => one.textContent)"
READY = "document.querySelector('.panel canvas')?.width === 1600 && !document.body.classList.contains('busy')"
IDLE = "!document.body.classList.contains('busy')"


def find(image: np.ndarray) -> SimpleNamespace:
    """A segmenter that always finds a patch and a scratch."""
    masks = np.zeros((3, *image.shape[:2]), dtype=bool)
    masks[0, 50:90, 100:300] = masks[1, :, 900:920] = True
    return SimpleNamespace(masks=masks, scores=np.array([0.75, 0.5, -4.0]))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    return make_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def page(tmp_path, strips, adapters) -> Iterator[Page]:
    """The application in a real server at `address`."""
    made = Page(
        tmp_path / "page", strips / "train_images", adapters, makers={"line_1": lambda: Inspector(find, (1, 2, 4))}
    )
    server = uvicorn.Server(uvicorn.Config(made.app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    made.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    yield made
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def tab(chromium, page, tmp_path) -> Iterator[Tab]:  # noqa: F811
    with open_tab(chromium, tmp_path / "profile") as opened:
        yield opened


def begin(tab: Tab, page: Page, size: dict = DESK, dark: bool = False) -> None:
    tab.look(size, dark)
    tab.open(page.address)
    tab.wait(READY)


def shown(tab: Tab, panel: int = 0) -> np.ndarray:
    """The pixels of a panel's canvas that are not transparent, bool [256, 1600]."""
    place = tab.value(f"""(() => {{ const canvas = document.querySelectorAll(".panel canvas")[{panel}];
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return [...data.filter((_, place) => place % 4 === 3)].map(one => one ? "1" : "0").join("") }})()""")
    return (np.frombuffer(place.encode(), np.uint8) == ord("1")).reshape(256, 1600)


def quiet(tab: Tab, page: Page) -> None:
    """Asserts that the console is empty and no other address was requested."""
    tab.value("1")
    assert not tab.said and all(url.startswith((page.address, "data:")) for url in tab.asked), (tab.said, tab.asked)


def differ(seen: np.ndarray, mask: np.ndarray, x: float, y: float) -> int:
    """The number of pixels outside a click's dot in which two masks differ."""
    beside = np.ones_like(mask)
    beside[max(int(y) - 15, 0) : int(y) + 15, max(int(x) - 15, 0) : int(x) + 15] = False
    return int((seen ^ mask)[beside].sum())


def test_a_click_shows_the_masks_of_base_and_adapter_where_it_was(page, tab):
    begin(tab, page)
    assert tab.value("[...document.querySelectorAll('.model')].map(one => one.value)") == ["sam2_nano", "line_1"]
    tab.click(".panel:nth-child(2) canvas", 0.25, 0.5)
    tab.wait(f"{FACTS}.every(text => text.includes('IoU'))")
    ((x, y, label),) = clicks = list(page.engine._low)[-1][4]
    assert abs(x - 400) < 2 and abs(y - 128) < 2 and label == 1
    for panel, name in enumerate(("sam2_nano", "line_1")):
        mask = mask_of(page.engine.answer(0, name, Prompts(clicks)).runs.ravel().tolist(), 256, 1600)
        assert differ(shown(tab, panel), mask, x, y) == 0 and mask.any()
    quiet(tab, page)


def test_right_click_drag_undo_and_clear(page, tab):
    begin(tab, page)
    tab.click(".panel canvas", 0.25, 0.5)
    tab.wait(f"{FACTS}[0]")
    tab.click(".panel canvas", 0.75, 0.5, "right")
    tab.wait(f"{IDLE} && {FACTS}[0]")
    assert [label for *_, label in list(page.engine._low)[-1][4]] == [1, 0]
    tab.click("#undo")
    tab.wait(IDLE)
    tab.drag(".panel canvas", (0.1, 0.2), (0.4, 0.8))
    tab.wait(f"{IDLE} && {FACTS}[0]")
    box, clicks = list(page.engine._low)[-1][3:5]
    assert clicks == () and np.allclose(box, [160, 51.2, 640, 204.8], atol=2)
    tab.click("#clear")
    tab.wait(f"{IDLE} && !{FACTS}[0]")
    assert not shown(tab).any() and tab.value("document.querySelector('.keep').disabled")
    quiet(tab, page)


def test_keep_switch_and_save(page, tab):
    begin(tab, page)
    tab.choose(".panel:nth-child(2) .model", "line_2")
    tab.choose("#class", "2")
    tab.click(".panel canvas", 0.3, 0.4)
    tab.wait(f"{FACTS}.every(text => text.includes('IoU'))")
    tab.click(".panel:nth-child(2) .keep")
    tab.wait("document.querySelectorAll('#list li').length === 1")
    assert "scratches" in tab.value("document.querySelector('#list li').textContent")
    assert page.labels.of(0)[0][0].model == "line_2"
    tab.click("#next")
    tab.wait(f"{READY} && document.querySelector('#strip').value === {json.dumps(page.images.names()[1])}")
    tab.click("#clean")
    tab.wait("document.querySelector('#counts').textContent.includes('2 strips')")
    tab.click("#save")
    tab.wait("document.querySelector('#message').textContent.startsWith('saved in')")
    found = json.loads((page.out / "round-1/annotations.json").read_text())
    assert len(found["annotations"]) == 1 and len(found["images"]) == 2
    tab.open(page.address)  # reloading the page loses nothing
    tab.wait(f"{READY} && document.querySelectorAll('#list li').length === 1")
    tab.click("#list button")
    tab.wait("document.querySelectorAll('#list li').length === 0")
    quiet(tab, page)


def test_class_prompts_are_offered_where_a_model_has_them(page, tab):
    begin(tab, page)
    assert tab.value("!document.querySelector('#classes-row').hidden")
    tab.click("#class-prompts")
    tab.wait(f"{FACTS}[1] === 'patches 0.75, scratches 0.50'")
    seen = shown(tab, 1)
    assert np.array_equal(seen, find(page.images.read(0)).masks.any(0)) and not shown(tab, 0).any()
    tab.click(".panel:nth-child(2) .keep")
    tab.wait("document.querySelectorAll('#list li').length === 2")
    quiet(tab, page)


def test_without_class_prompts_there_is_no_switch(page, tab):
    page.pages.makers.clear()
    begin(tab, page)
    assert tab.value("document.querySelector('#classes-row').hidden && document.querySelector('#whole-row').hidden")


def test_a_refusal_is_shown(page, tab):
    begin(tab, page)
    tab.click("#save")
    said = tab.wait("document.querySelector('#message.wrong')?.textContent")
    assert said == "no mask was kept and no strip marked as clean, so there is nothing to save"


def test_a_strip_that_cannot_be_opened_leaves_no_other_one_to_click_on(page, tab):
    """The page still shows the previous strip, so a click there must not be sent for the chosen one."""
    begin(tab, page)
    tab.click(".panel canvas", 0.25, 0.5)
    tab.wait(f"{FACTS}[0]")
    page.images.paths[1] = page.images.paths[1].with_name("gone.png")
    answered = len(page.engine._low)
    tab.click("#next")
    assert "gone.png" in tab.wait("document.querySelector('#message.wrong')?.textContent")
    for selector in (".panel canvas", ".panel .keep", "#clean"):
        tab.click(selector, 0.3, 0.5)
    tab.wait(IDLE)
    assert len(page.engine._low) == answered and page.labels.count() == (0, 0)
    tab.click("#previous")
    tab.wait(f"{IDLE} && !document.querySelector('.wrong')")
    tab.click(".panel canvas", 0.3, 0.5)
    tab.wait(f"{FACTS}[0].includes('IoU')")
    assert len(page.engine._low) > answered


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [DESK, PHONE])
def test_on_a_desk_and_a_phone_light_and_dark(page, tab, tmp_path, size, dark):
    """Nothing is wider than the screen, controls are large enough for a finger, and a tap is a click."""
    begin(tab, page, size, dark)
    if size is PHONE:
        tab.tap(".panel canvas", 0.1, 0.5)
    else:
        tab.click(".panel canvas", 0.1, 0.5)
    tab.wait(f"{FACTS}[0].includes('IoU')")
    assert tab.value("document.documentElement.scrollWidth - innerWidth") <= 0
    small = tab.value("""[...document.querySelectorAll("button, select, .bar span:not(.soft)")].filter(one =>
        one.offsetParent && one.getBoundingClientRect().height < 32).map(one => one.outerHTML)""")
    assert small == []
    with Image.open(tab.screenshot(tmp_path / "shot.png")) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert image.width == size["width"] * size["deviceScaleFactor"]
    assert PAPER[dark] in [colour for _, colour in sorted(colours)[-3:]]
    quiet(tab, page)
