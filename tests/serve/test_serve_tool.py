"""`tools/serve.py` as a user starts it: its output, its address, its end, and its errors."""

import http.client
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.serve_pages import BASE, make_adapters
from sam2_lora_ext.serve.models import named_adapters
from sam2_lora_ext.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def test_adapters_have_names():
    assert named_adapters(["a=x/y", "runs/r8", "runs/r9/adapters/best"]) == {
        "a": Path("x/y"),
        "r8": Path("runs/r8"),
        "r9": Path("runs/r9/adapters/best"),
    }
    with pytest.raises(UserError, match="two adapters are called 'r8'"):
        named_adapters(["runs/r8", "other/r8"])


def start(*arguments: str | Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "tools/serve.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    "how, code, words", [(signal.SIGINT, 130, "stopped by Ctrl-C"), (signal.SIGTERM, 143, "")], ids=["ctrl_c", "term"]
)
def test_the_tool_serves_until_it_is_stopped(tmp_path, strips, monkeypatch, how, code, words):
    """Ctrl-C stops it, or SIGTERM, as containers send it; no dropped image stays on the disk."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    adapters = make_adapters(tmp_path)
    process = start(
        "--checkpoint",
        BASE,
        "--adapter",
        f"line={adapters['line_1']}",
        "--images",
        strips / "train_images",
        "--out",
        tmp_path / "out",
        "--port",
        "0",
    )
    lines = []
    while not lines or not lines[-1].startswith("open"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    assert lines[0].startswith("models   sam2_nano, line on") and lines[1].startswith("images   12")
    port = int(re.search(r"http://127.0.0.1:(\d+)/", lines[-1])[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.status == 200 and b"Click on a strip" in answer.read()
    connection.close()
    addresses = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), port)}
    for address in addresses - {"127.0.0.1", "::1", "127.0.1.1"}:  # it listens only at the loopback address
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=5).close()
    time.sleep(0.2)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and words in err and "Traceback" not in err
    assert out == "kept     0 masks on 0 strips\n" and not list((tmp_path / "tmp").iterdir())


def test_the_tool_refuses_in_one_sentence(tmp_path, strips, capsys, nano_base):
    from serve import main

    adapter = make_adapters(tmp_path)["line_1"]
    given = ["--checkpoint", str(BASE), "--port", "0"]

    def said(*arguments: str) -> str:
        with pytest.raises(UserError) as found:
            main(list(arguments))
        assert "\n" not in str(found.value)
        return str(found.value)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "choose another --port" in said("--checkpoint", str(BASE), "--port", str(port))
    assert "there is no file" in said("--checkpoint", str(tmp_path / "none.pt"), "--port", "0")
    assert "is a folder: give a weight file" in said("--checkpoint", str(tmp_path), "--port", "0")
    assert "cannot list the image folder" in said(*given, "--images", str(tmp_path / "none"))
    assert "was trained on" in said("--checkpoint", str(nano_base), "--port", "0", "--adapter", str(adapter))
    twice = "two models are called 'sam2_nano': "
    assert f"{twice}rename the file {BASE}" in said(*given, "--compare", str(BASE))
    assert f"{twice}name adapters with" in said(*given, "--adapter", f"sam2_nano={adapter}")
    assert "there is no" in said(*given, "--adapter", "x=none")
    assert capsys.readouterr().out == ""
