"""The Dockerfile by hadolint's rules, as far as they concern it, and what of the checkout goes into the image."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) with continued lines joined and comments left out."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    return [(line.split()[0], re.sub(r"\s+", " ", line.split(maxsplit=1)[1])) for line in lines if line.strip()]


def of(keyword: str) -> list[str]:
    return [rest for name, rest in instructions() if name == keyword]


def test_the_base_is_pinned_by_tag_and_digest():
    (base,) = of("FROM")
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-base-ubuntu24\.04@sha256:[0-9a-f]{64}", base)  # DL3006, DL3007
    torch = pytest.importorskip("torch")
    if torch.version.cuda:
        assert base.startswith(f"nvidia/cuda:{torch.version.cuda}")


def test_it_does_not_run_as_root():
    assert of("USER") == ["steel"]  # DL3002
    users = [place for place, (name, _) in enumerate(instructions()) if name == "USER"]
    assert not [rest for name, rest in instructions()[users[-1] :] if name in ("RUN", "COPY")]


def test_it_follows_hadolints_rules():
    known = {"FROM", "SHELL", "RUN", "ENV", "WORKDIR", "COPY", "USER", "EXPOSE", "CMD"}
    assert {name for name, _ in instructions()} <= known  # DL3020 ADD, DL4000 MAINTAINER
    assert "pipefail" in of("SHELL")[0]  # DL4006
    assert all(rest.startswith("[") for rest in of("CMD"))  # DL3025
    assert all(rest.startswith("/") for rest in of("WORKDIR"))  # DL3000
    names = [name for name, _ in instructions()]
    assert ("RUN", "RUN") not in list(zip(names, names[1:]))  # DL3059
    assert names.index("WORKDIR") < names.index("COPY")  # DL3045
    for command in of("RUN"):
        assert not re.search(r"\bsudo\b|\bcd |curl|wget|apt-get upgrade|\bapt ", command)  # DL3003 to 3005, DL3027
        for part in re.findall(r"pip install[^&]*", command):
            assert "--no-cache-dir" in part and re.search(r"-r \S+|-e \.", part)  # DL3042, DL3013
        for part in re.findall(r"apt-get install[^&]*", command):
            assert "-y" in part and "--no-install-recommends" in part  # DL3014, DL3015
            assert "apt-get update &&" in command and "rm -rf /var/lib/apt/lists/*" in command  # DL3009
        if "useradd" in command:
            assert "--no-log-init" in command  # DL3046
    assert TEXT.count("hadolint ignore=") == 1  # DL3008: the reason stands above it


def test_the_installation_is_that_of_make_env():
    """The same files, in the same order, with the same switches."""
    image = re.findall(r"(SAM2_BUILD_CUDA=0 )?pip install ([^&]*)", " && ".join(of("RUN")))
    recipe = (ROOT / "Makefile").read_text().replace("\\\n", " ").partition("$(STAMP): ")[2].partition("\n\n")[0]
    made = re.findall(r"(SAM2_BUILD_CUDA=0 )?\$\(PY\) -m pip install (.*)", recipe)

    def plain(commands: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
        dropped = {"--no-cache-dir", "--disable-pip-version-check"}
        return [(build, [word for word in words.split() if word not in dropped]) for build, words in commands]

    assert plain(image) == plain(made) and len(image) == 3


def test_the_image_gets_what_it_needs_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    taken = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in taken)
    for folder in ("runs", "data", "checkpoints", ".git", ".venv", "notes", "shared"):
        assert folder not in taken
    needed = {name for rest in of("COPY") for name in rest.split()[:-1] if name != "."}
    assert (
        needed
        | {
            "setup.py",
            "pyproject.toml",
            "MANIFEST.in",
            "README.md",
            "LICENSE",
            "configs",
            "sam2_lora_ext",
            "hydra_plugins",
            "tools",
        }
        <= taken
    )
