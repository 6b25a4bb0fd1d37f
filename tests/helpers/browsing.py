"""A headless browser for tests: `chromium` is its path, `browse` opens a page without any network."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail("no chromium on the PATH: apt-get install chromium", pytrace=False)
        pytest.skip("no chromium on the PATH")
    return found


def browse(chromium: str, file: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={file.parent / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        *options,
        f"file://{file}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
