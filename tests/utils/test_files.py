"""Writing files and folders: atomically, and never over a path that may not be replaced."""

import os
from pathlib import Path

import pytest

from sam2_lora_ext.utils import folders
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_atomic, write_json
from sam2_lora_ext.utils.folders import existing_folder, replace_folder, settle_folder

NO_LINKS = pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])


@NO_LINKS
def test_a_file_that_appears_meanwhile_is_not_replaced(links, tmp_path, monkeypatch):
    """The check at the beginning is not enough: writing may take minutes."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(PermissionError("no links here")))

    def write(temporary: Path) -> None:
        (tmp_path / "out").write_text("another's")
        temporary.write_text("ours")

    with pytest.raises(UserError, match="out exists already: .*--force"):
        write_atomic(tmp_path / "out", write, force=False)
    assert (tmp_path / "out").read_text() == "another's" and os.listdir(tmp_path) == ["out"]
    write_atomic(tmp_path / "out", write)
    assert (tmp_path / "out").read_text() == "ours"
    write_atomic(tmp_path / "new", lambda path: path.write_text("new"), force=False)
    assert (tmp_path / "new").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["new", "out"]


def test_only_a_regular_file_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "real").write_text("real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, kind in {"folder": "folder", "link": "link", "dangling": "link", "pipe": "device or pipe"}.items():
        with pytest.raises(UserError, match=f"{name} is a {kind}, and only files can be replaced"):
            write_json(tmp_path / name, 1)
        with pytest.raises(UserError, match=f"is a {kind}"):
            refuse_existing(tmp_path / name, force=False)
    assert (tmp_path / "real").read_text() == "real" and len(os.listdir(tmp_path)) == 5


def test_inputs_are_known_by_what_they_are(tmp_path):
    """By any name, hard or soft link, and in any folder that is read."""
    (tmp_path / "data").mkdir()
    source = tmp_path / "data/in.csv"
    source.write_text("1")
    os.link(source, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(source)
    for out in (source, tmp_path / "hard", tmp_path / "soft", tmp_path / "data/../data/in.csv"):
        with pytest.raises(UserError, match="which is read: choose another file"):
            refuse_input_files(out, [tmp_path / "missing", source])
    with pytest.raises(UserError, match="is a file in .*data, which is read"):
        refuse_input_files(tmp_path / "soft", [tmp_path / "data"])
    refuse_input_files(tmp_path / "data/new", [tmp_path / "data", source])  # replaces nothing


def fill(folder: Path, text: str) -> None:
    (folder / "a").write_text(text)
    (folder / "b").write_text(text)


def test_a_folder_is_replaced_as_one(tmp_path):
    out = tmp_path / "out"
    replace_folder(out, lambda folder: fill(folder, "1"), {"a", "b"}, force=False)
    (out / "mine").write_text("a user's")
    with pytest.raises(UserError, match="out exists already"):
        replace_folder(out, lambda folder: fill(folder, "2"), {"a", "b"}, force=False)
    with pytest.raises(UserError, match="cannot write"):
        replace_folder(out, lambda folder: (folder / "a" / "b").touch(), {"a", "b"})
    assert {file.name: file.read_text() for file in out.iterdir()} == {"a": "1", "b": "1", "mine": "a user's"}
    replace_folder(out, lambda folder: fill(folder, "2"), {"a", "b"})
    assert {file.name: file.read_text() for file in out.iterdir()} == {"a": "2", "b": "2", "mine": "a user's"}
    assert os.listdir(tmp_path) == ["out"]


@NO_LINKS
def test_a_folder_that_appears_meanwhile_is_not_replaced(links, tmp_path):
    def write(folder: Path) -> None:
        fill(folder, "ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/a").write_text("another's")

    with pytest.raises(UserError, match="out exists already"):
        replace_folder(tmp_path / "out", write, {"a", "b"}, force=False)
    assert (tmp_path / "out/a").read_text() == "another's" and os.listdir(tmp_path) == ["out"]


class Killed(BaseException):
    """As a kill: nothing of ours catches it."""


@pytest.mark.parametrize("moment", ["writing", "first rename", "second rename", "deleting"])
def test_a_kill_at_each_moment(moment, tmp_path, monkeypatch):
    """There is one whole folder, old or new, to read at once; the next writer leaves nothing of it behind."""
    out, parts = tmp_path / "out", {"a", "b"}
    replace_folder(out, lambda folder: fill(folder, "1"), parts)
    rename, unlink = Path.rename, Path.unlink
    calls = []

    def renaming(self: Path, target: Path) -> Path:
        result = rename(self, target)
        calls.append(self.name)
        if len(calls) == {"first rename": 1, "second rename": 2}.get(moment):
            raise Killed
        return result

    def unlinking(self: Path, *args, **kwargs) -> None:
        unlink(self, *args, **kwargs)
        if moment == "deleting":
            raise Killed

    def write(folder: Path) -> None:
        (folder / "a").write_text("2")
        if moment == "writing":
            raise Killed
        fill(folder, "2")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renaming)
        patch.setattr(Path, "unlink", unlinking)
        patch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process cleans up nothing
        with pytest.raises(Killed):
            replace_folder(out, write, parts)
    found = existing_folder(out)
    text = "1" if moment in ("writing", "first rename") else "2"
    assert {file.name: file.read_text() for file in found.iterdir()} == {"a": text, "b": text}
    assert out.exists() == (moment != "first rename") and len(os.listdir(tmp_path)) == 2 - (moment == "nothing")
    settle_folder(out, parts)
    assert (out / "a").read_text() == text and not (tmp_path / ".out.old").exists()
    replace_folder(out, lambda folder: fill(folder, "3"), parts)
    assert (out / "a").read_text() == "3" and os.listdir(tmp_path) == ["out"]
