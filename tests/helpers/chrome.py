"""A headless Chromium that tests drive as a user would: real mouse and touch events, through its debugging pipe."""

import base64
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
SECONDS = 60


class Tab:
    """One page.

    Attributes:
        said: what the page wrote to its console, and its errors.
        asked: the addresses that the page requested.
    """

    def __init__(self, process: subprocess.Popen, into: int, out: int):
        self.process, self.into, self.out = process, into, out
        self.said: list[str] = []
        self.asked: list[str] = []
        self._number, self._rest, self._session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self.into, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self.out, 1 << 16)
            assert piece, "the browser has ended"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        found = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.asked.append(found["request"]["url"])
        elif event["method"] == "Runtime.consoleAPICalled":
            self.said.append(str(found["args"]))
        elif event["method"] == "Runtime.exceptionThrown":
            self.said.append(str(found["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded":
            self.said.append(found["entry"]["text"])

    def look(self, size: dict[str, Any], dark: bool) -> None:
        """The screen and the colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=size["mobile"])
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Waits until an expression is true, and returns it."""
        end = time.monotonic() + SECONDS
        while not (value := self.value(expression)):
            assert time.monotonic() < end, (expression, self.said, self.value("document.body.innerText"))
            time.sleep(0.05)
        return value

    def place(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """The point of the screen at shares of an element, which is scrolled into view."""
        box = self.value(f"""(() => {{ const found = document.querySelector({json.dumps(selector)});
            const box = found.getBoundingClientRect();
            if (box.bottom > innerHeight || box.top < 130) found.scrollIntoView({{ block: "center" }});
            return found.getBoundingClientRect().toJSON() }})()""")
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def click(self, selector: str, x: float = 0.5, y: float = 0.5, button: str = "left") -> None:
        """A press and release of the mouse at shares of an element."""
        self.drag(selector, (x, y), (x, y), button)

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float], button: str = "left") -> None:
        (x0, y0), (x1, y1) = self.place(selector, *start), self.place(selector, *end)
        steps = [("mouseMoved", x0, y0), ("mousePressed", x0, y0)]
        if start != end:
            steps += [("mouseMoved", (x0 + x1) / 2, (y0 + y1) / 2), ("mouseMoved", x1, y1)]
        for kind, x, y in [*steps, ("mouseReleased", x1, y1)]:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def tap(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """A finger on an element."""
        left, top = self.place(selector, x, y)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": left, "y": top}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def choose(self, selector: str, value: str) -> None:
        """Sets a list or a field as a user does, with its event."""
        self.value(f"""(() => {{ const found = document.querySelector({json.dumps(selector)});
            found.value = {json.dumps(value)}; found.dispatchEvent(new Event("change", {{ bubbles: true }})) }})()""")

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path


@contextlib.contextmanager
def open_tab(chromium: str, profile: Path) -> Iterator[Tab]:
    """A separate browser that can connect to this machine only."""
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()

    def ends() -> None:  # the pipe's file descriptors are 3 and 4
        os.dup2(in_read, 13), os.dup2(out_write, 14)
        os.dup2(13, 3), os.dup2(14, 4)

    process = subprocess.Popen(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
        ],
        preexec_fn=ends,
        close_fds=False,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        os.close(in_read), os.close(out_write)
        yield Tab(process, in_write, out_read)
    finally:
        os.write(in_write, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        os.close(in_write), os.close(out_read)
