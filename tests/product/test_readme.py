"""The README is short, and what it names is there. Its commands are run by test_docs.py."""

import re

from helpers.doc_pages import README, blocks, commands


def test_it_is_short_and_has_what_a_newcomer_needs():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert {"## Install", "## Severstal in five commands", "## Deploy", "## Limits"} <= set(lines)
    five = README.read_text().split("## Severstal in five commands")[1].split("```")[1]
    assert len(re.findall(r"^python ", five, re.M)) == 5
    assert len(blocks(README, "python")[0].strip().splitlines()) <= 7
    assert "make demo" in commands(README)


def test_it_names_every_config(repository):
    """Either in full, or as `_r16` beside a name that begins alike."""
    text = README.read_text()
    for path in (repository / "configs").glob("*.yaml"):
        names = {path.stem, path.stem.removeprefix("severstal_lora")}
        assert path.stem == "sam2_nano" or any(f"`{name}`" in text for name in names), path.stem
