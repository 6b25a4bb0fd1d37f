"""Tools on their --out: nothing is replaced without --force, and with it only our own files, never an input."""

import json
import os
import shutil
from pathlib import Path

import ablate
import merge_lora
import prepare_data
import pytest
import report
import unmerge_lora

from sam2_lora_ext.evaluate.gallery import refuse_gallery
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.folders import replace_folder

OLD = Path(__file__).parents[1] / "fixtures/run_0_1_0"


@pytest.fixture
def data(tmp_path, strips) -> Path:
    return Path(shutil.copytree(strips, tmp_path / "data"))


def test_a_scan_or_split_does_not_destroy_the_annotations(data):
    """A table of this name may be read and written; an image is never an output."""
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    image = next((data / "train_images").iterdir())
    os.link(data / "train.csv", data / "scan.json")
    for out in (data / "train.csv", image):
        with pytest.raises(UserError, match="which is read: choose another file"):
            prepare_data.main(["split", str(data), "--out", str(out), "--force", "--quiet", "--ignore-duplicates"])
    with pytest.raises(UserError, match="scan.json is the same file as .*train.csv, which is read"):
        prepare_data.main(["scan", str(data), "--out", str(data), "--force", "--quiet"])
    assert {path: path.read_bytes() for path in before} == before


def test_a_merge_does_not_destroy_what_it_reads(tmp_path, nano_base):
    adapter = Path(shutil.copytree(OLD / "rslora/adapters/final", tmp_path / "adapter"))
    base = Path(shutil.copy(nano_base, tmp_path / "base.pt"))
    os.link(base, tmp_path / "merged.pt")
    os.link(adapter / "adapter_config.json", tmp_path / "new.pt.json")
    for out in ("base.pt", "merged.pt", "adapter/adapter_model.safetensors", "new.pt"):
        with pytest.raises(UserError, match="which is read: choose another file"):
            merge_lora.main(["--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / out), "--force"])
    with pytest.raises(UserError, match="which is read; choose another folder"):
        unmerge_lora.main(["--base", str(base), "--merged", str(base), "--out", str(tmp_path), "--force"])
    assert base.read_bytes() == nano_base.read_bytes()


def test_a_report_replaces_pages_alone(tmp_path):
    run = Path(shutil.copytree(OLD / "rslora", tmp_path / "run"))
    before = (run / "lora.json").read_bytes()
    with pytest.raises(UserError, match="lora.json, which is read: choose another file"):
        report.main([str(run), "--out", str(run / "lora.json"), "--force"])
    assert (run / "lora.json").read_bytes() == before
    report.main([str(run)])
    with pytest.raises(UserError, match="report.html exists already"):
        report.main([str(run)])
    report.main([str(run), "--force"])


def test_an_ablation_does_not_replace_a_strangers_table(tmp_path):
    (tmp_path / "ablation.csv").write_text("mine")
    with pytest.raises(UserError, match="ablation.csv exists and is not from an ablation"):
        ablate.main(["-c", "demo", "--grid", "lora.rank=2", "--out", str(tmp_path)])
    assert (tmp_path / "ablation.csv").read_text() == "mine"


def test_a_gallery_is_replaced_as_a_whole(tmp_path):
    """Not without --force; with it all earlier pictures are deleted, but no other files."""
    gallery = tmp_path / "gallery"
    refuse_gallery(gallery, force=False)
    replace_folder(gallery, lambda folder: (folder / "best_3.jpg").touch(), ())
    with pytest.raises(UserError, match="gallery exists already"):
        refuse_gallery(gallery, force=False)
    refuse_gallery(gallery, force=True)
    (gallery / "strip_0.jpg").touch()
    with pytest.raises(UserError, match="has 'strip_0.jpg', which is not one of its pictures"):
        refuse_gallery(gallery, force=True)


def test_benchmarks_replace_their_own_default_alone(tmp_path):
    import argparse

    from benchmarks.output import add_out, check_out, write_result

    parser = argparse.ArgumentParser()
    add_out(parser, tmp_path / "own.json")
    (tmp_path / "other.json").write_text("mine")
    with pytest.raises(UserError, match="other.json exists already"):
        check_out(parser.parse_args(["--out", str(tmp_path / "other.json")]))
    for _ in range(2):
        args = parser.parse_args([])
        check_out(args)
        write_result(args, [1])
        write_result(args, [1, 2])
    assert json.loads((tmp_path / "own.json").read_text()) == [1, 2]
