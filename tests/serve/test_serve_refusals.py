"""The page refuses other hosts and origins, paths outside its own, and unbounded uploads."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from helpers.serve_pages import Page
from sam2_lora_ext.serve import images as images_module
from sam2_lora_ext.serve.guards import LARGEST_BODY, LOCAL, refusal
from sam2_lora_ext.serve.images import LARGEST_UPLOAD, Images, check_name
from sam2_lora_ext.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "sam2_lora_ext/serve/page").iterdir())


@pytest.fixture(scope="module")
def page(tmp_path_factory, strips) -> Page:
    return Page(tmp_path_factory.mktemp("page"), strips / "train_images", {})


@pytest.fixture
def client(page):
    return page.client


def test_only_names_of_this_machine_are_served(client):
    """Otherwise a page whose name an attacker's DNS resolves to 127.0.0.1 could read the responses."""
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"):
        assert client.get("/api/state", headers={"host": host}).status_code == 200
    for host in (
        "evil.example",
        "localhost.evil.example:8000",
        "127.0.0.1.evil.example",
        "evil@localhost",
        "",
        "[::1",
        "localhost/x",
        "0.0.0.0:8000",
    ):
        answer = client.get("/api/state", headers={"host": host})
        assert answer.status_code == 403 and "--name NAME" in answer.json()["detail"]
    twice = Headers(raw=[(b"host", b"localhost"), (b"host", b"evil.example")])
    assert refusal(twice, "GET", "/", frozenset(LOCAL), 9)[0] == 403


def test_requests_of_other_pages_are_refused(client):
    body = {"clean": True}
    ours = {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}
    assert client.post("/api/images/0/clean", json=body, headers=ours).status_code == 200
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://localhost:3000"},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "file://"},
        {"origin": "http://["},
        {"origin": "http://localhost:8000/x"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    ):
        for answer in (
            client.post("/api/images/0/clean", json=body, headers=headers),
            client.get("/api/images/0", headers=headers),
            client.options("/api/images/0/clean", headers=headers),
        ):
            assert answer.status_code == 403 and "another page" in answer.json()["detail"]
            assert "access-control-allow-origin" not in answer.headers
    opened = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}  # a link to the page
    assert client.get("/", headers=opened).status_code == 200


def test_every_answer_forbids_other_addresses_and_frames(client):
    for path in ("/", "/page.js", "/api/state", "/api/images/0", "/none"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_other_address():
    assert [path.name for path in FILES] == ["index.html", "page.css", "page.js", "view.js"]
    for path in FILES:
        assert not re.search(r"https?:|//[a-z]+\.|\bon\w+=\"|<style|innerHTML|\beval\b", path.read_text()), path
        assert all(len(line) <= 120 for line in path.read_text().splitlines())


def raw(page: Page, path: str, method: str = "GET") -> int:
    """The status of a request whose path no client normalises."""
    sent = []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
    }

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    import anyio

    anyio.run(page.app, scope, receive, send)
    return sent[0]["status"]


@pytest.mark.parametrize(
    "path",
    [
        "/../serve.py",
        "/page/../app.py",
        "/%2e%2e/app.py",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/page.js/../app.py",
        "/api/images/../state",
        "/api/images/..",
        "/api/images/0/../../../x",
        "/api/images/%2fetc%2fpasswd",
        "/docs",
        "/api/images/syn000700000.jpg",
        "/api/images/1e0",
        "/api/images/\0",
        "/openapi.json",
        "/index.html",
    ],
)
def test_no_path_leads_to_a_file(page, path):
    assert raw(page, path) in (404, 405, 422)


def test_an_image_is_named_by_its_number_alone(client):
    assert client.get("/api/images/99").status_code == 400 and client.get("/api/images/-1").status_code == 400


@pytest.mark.parametrize(
    "name",
    [
        "../x.png",
        "/etc/x.png",
        "a/b.png",
        "a\\b.png",
        "..",
        ".x.png",
        "x.png\0",
        "x\n.png",
        "C:x.png",
        "x.txt",
        "x",
        "",
        " x.png",
        "x.png.",
        "x" * 300 + ".png",
        "\u6f22" * 100 + ".png",
        "x\udcff.png",
        "x?.png",
        "Thumbs.db",
    ],
)
def test_a_dropped_name_is_a_plain_image_name(name):
    with pytest.raises(UserError, match="plain file name|does not end like an image"):
        check_name(name)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a" * 65, "/x", "x\n", "a b", "ä", "-x", "con:"])
def test_a_data_set_lies_in_the_out_folder(page, name):
    page.post("/api/images/0/clean", {"clean": True})
    assert "letters, digits, - and _" in page.refused("/api/save", {"format": "coco", "name": name})
    assert not page.out.exists()


def png(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((np.arange(width * height) % 256).astype(np.uint8).reshape(height, width)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_dropped_image_is_clicked_on_and_saved(tmp_path):
    page = Page(tmp_path, None, {})
    found = page.client.post("/api/images", params={"name": "Stück 1.png"}, content=png()).json()
    assert found == {"image": 0, "images": ["Stück 1.png"]}
    assert page.post("/api/images/0/open", ["sam2_nano"])["width"] == 40
    keep = {"image": 0, "model": "sam2_nano", "class_id": 1, "box": [2, 2, 30, 20]}
    assert page.post("/api/keep", keep)["masks"] == 1
    page.post("/api/save", {"format": "label_png", "name": "a"})
    assert (page.out / "a/images/Stück 1.png").read_bytes() == png()
    for name in ("Stück 1.png", "STÜCK 1.PNG"):
        again = page.client.post("/api/images", params={"name": name}, content=png())
        assert again.status_code == 400 and "already" in again.json()["detail"]


def test_uploads_are_bounded(tmp_path, monkeypatch):
    page = Page(tmp_path, None, {})

    def drop(name: str, content, **headers: str) -> tuple[int, str]:
        answer = page.client.post("/api/images", params={"name": name}, content=content, headers=headers)
        return answer.status_code, answer.json().get("detail", "")

    assert drop("a.png", b"")[0] == 400
    assert drop("a.png", png()[:-20])[0] == 400
    assert drop("a.png", b"<svg/>")[0] == 400
    assert drop("../a.png", png())[0] == 400
    assert drop("a.png", b"x", **{"content-length": str(LARGEST_UPLOAD + 1)})[0] == 413
    assert drop("a.png", b"x", **{"content-length": "9" * 30})[0] == 413
    pieces = (b"x" * (1 << 20) for _ in range(LARGEST_UPLOAD // (1 << 20) + 2))  # without a Content-Length
    assert drop("a.png", pieces) == (413, f"the request is larger than {LARGEST_UPLOAD:,} bytes")
    large = b"[" + b" " * LARGEST_BODY + b"]"
    for path in ("/api/predict", "/api/images/0/open", "/api/save"):
        assert page.client.post(path, content=large, headers={"content-type": "application/json"}).status_code == 413
    monkeypatch.setattr(images_module, "UPLOAD_PIXELS", 1000)
    assert "40x30 pixels, but the limit is 1,000" in drop("a.png", png())[1]
    monkeypatch.setattr(images_module, "UPLOAD_PIXELS", 10000)
    monkeypatch.setattr(images_module, "MOST_UPLOADS", 1)
    assert drop("a.png", png())[0] == 200
    assert "there are already 1 dropped images" in drop("b.png", png())[1]
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["a.png"]  # refused uploads leave no file


def test_a_fault_of_the_server_is_a_sentence_too(tmp_path, strips):
    page = Page(tmp_path, strips / "train_images", {})
    page.pages.makers["sam2_nano"] = lambda: 1 / 0
    client = TestClient(page.app, base_url="http://localhost", raise_server_exceptions=False)
    answer = client.post("/api/classes", json={"image": 0, "model": "sam2_nano"})
    assert answer.status_code == 500 and "the server failed (ZeroDivisionError)" in answer.json()["detail"]


def test_a_damaged_image_is_a_sentence(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png()[:60])
    page = Page(tmp_path / "page", tmp_path / "images", {})
    assert "a.png: " in page.refused("/api/images/0/open", ["sam2_nano"])
    (tmp_path / "images" / os.fsdecode(b"b\xff.png")).write_bytes(png())
    odd = Page(tmp_path / "odd", tmp_path / "images", {})
    assert odd.client.get("/api/state").json()["images"] == ["a.png", "b\\udcff.png"]
    assert "not UTF-8 text: rename the file" in odd.refused("/api/images/1/open", ["sam2_nano"])
    assert "not UTF-8" in odd.refused("/api/images/1/clean", {"clean": True})
    with pytest.raises(UserError, match="holds no image"):
        Images(tmp_path / "page/uploads", tmp_path)
