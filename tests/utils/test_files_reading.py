"""`files.read_text`, `read_json`: only regular UTF-8 files of limited size; otherwise one sentence, immediately."""

import os
from pathlib import Path

import pytest

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import open_regular, read_json, read_text, sha256_of


def test_a_text_with_and_without_a_mark(tmp_path):
    (tmp_path / "a").write_bytes("ä\r\n".encode())
    (tmp_path / "b").write_bytes("ä\r\n".encode("utf-8-sig"))
    assert read_text(tmp_path / "a") == read_text(tmp_path / "b") == "ä\r\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "is a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"),
        (lambda path: path.write_bytes(bytes(1001)), "1,001 bytes, expected at most 1,000"),
        (lambda path: path.write_text("[" * 1000), "nested too deep"),
        (lambda path: path.write_text("{"), "not valid JSON"),
    ],
)
def test_what_is_no_text_is_a_sentence(make, said, tmp_path):
    path = tmp_path / "x"
    make(path)
    with pytest.raises(UserError, match=said) as refused:
        read_json(path, 1000)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 5000, "nul\0", "\ud800"])
def test_a_name_that_no_file_can_have(name, tmp_path):
    for read in (read_text, open_regular, sha256_of):
        with pytest.raises(UserError) as refused:
            read(tmp_path / name)
        assert len(str(refused.value)) < 1000


def test_a_file_of_proc_has_no_size_but_a_bound():
    assert "Name:" in read_text(Path("/proc/self/status"))
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_text(Path("/proc/self/status"), 10)
