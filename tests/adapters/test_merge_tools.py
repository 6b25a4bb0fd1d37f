"""The command lines merge_lora.py and export_adapter.py, as a user runs them, and the proof on stock SAM 2."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.missing_packages import run_without
from helpers.stock_models import NANO, build, train_a_little
from sam2_lora_ext.adapters.merge import merge_files
from sam2_lora_ext.adapters.peft import Adapter, load_adapter, save_adapter
from sam2_lora_ext.adapters.weights import read_weights, weights_id, write_weights
from sam2_lora_ext.commands.merge import verify
from sam2_lora_ext.deploy.stock import build_stock, noise_image, read_image
from sam2_lora_ext.deploy.verify import compare_merged, mask_ious
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.utils.command_line import run_cli
from sam2_lora_ext.utils.errors import UserError

HEAD = "sam_mask_decoder.iou_prediction_head"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.pt` and `run`, in a path with a space; tests write elsewhere."""
    folder = tmp_path_factory.mktemp("merge") / "a folder"
    model = build(NANO)
    write_weights(folder / "base.pt", model.state_dict())
    facts = {"base_id": weights_id(model.state_dict()), "base_path": "base.pt", "model_config": NANO}
    build_lora_model(model, {"rank": 4, "qkv_parts": ["q", "v"], "trainable": [HEAD]})
    train_a_little(model)
    save_adapter(Adapter.from_model(model, facts), folder / "run" / "adapters" / "best")
    return folder


FOREIGN = ("sam2", "training", "hydra", "omegaconf", "iopath", "fvcore", "torchvision", "tqdm", "peft", "PIL", "scipy")


def without_sam2(run_python, tool: Path, *args: object):
    """Runs a tool as on a machine with torch and safetensors alone."""
    return run_without(run_python, FOREIGN, tool, *args)


def test_merging_needs_torch_and_safetensors_only(folder, tmp_path, repository, run_python):
    tool = repository / "tools" / "merge_lora.py"
    args = ("--base", folder / "base.pt", "--adapter", folder / "run", "--out", tmp_path / "m.pt")
    done = without_sam2(run_python, tool, *args)
    assert done.returncode == 0, done.stderr
    facts = merge_files(folder / "base.pt", folder / "run", tmp_path / "here.pt")
    assert f"{facts.changed} of {facts.tensors} tensors changed" in done.stdout
    ours, theirs = read_weights(tmp_path / "here.pt"), read_weights(tmp_path / "m.pt")
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())

    done = without_sam2(run_python, tool, *args, "--force", "--verify", NANO)
    assert done.returncode == 2 and done.stderr.startswith("error: --verify needs SAM 2 (No module named 'hydra')")
    for tool, *args in (
        ("export_adapter.py", folder / "run", tmp_path / "adapter"),
        (
            "unmerge_lora.py",
            "--base",
            folder / "base.pt",
            "--merged",
            tmp_path / "m.pt",
            "--out",
            tmp_path / "back",
            "--full",
        ),
    ):
        done = without_sam2(run_python, repository / "tools" / tool, *args)
        assert done.returncode == 0, done.stderr
    assert load_adapter(tmp_path / "adapter").layers.keys() == load_adapter(tmp_path / "back").layers.keys()


def test_merge_verify_and_load_with_stock_sam2(folder, tmp_path, repository, run_python):
    """From another folder, with an image of another shape."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 400, 3), np.uint8)).save(tmp_path / "strip.png")
    done = run_python(
        [
            repository / "tools" / "merge_lora.py",
            "--base",
            folder / "base.pt",
            "--adapter",
            folder / "run",
            "--out",
            "m.pt",
            "--verify",
            NANO,
            "--image",
            "strip.png",
        ],
        cwd=tmp_path,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "merged",
        "into",
        "written",
        "record",
        "verify",
        "weights",
        "logits",
        "masks",
        "verified",
    ]
    build_stock(NANO, tmp_path / "m.pt")


@pytest.mark.parametrize(
    "name, dtype", [("m.pt", "float32"), ("m.safetensors", None), ("m.pt", "float16"), ("m.pt", "bfloat16")]
)
def test_the_proof_passes_and_fails(folder, tmp_path, name, dtype):
    out = tmp_path / name
    facts = merge_files(folder / "base.pt", folder / "run", out, dtype=dtype)
    result = compare_merged(out, folder / "base.pt", facts.adapter, NANO)
    assert result.passed and result.max_abs_logit > 0.1 and 0.9 < result.lowest_iou <= result.mean_iou <= 1
    if facts.dtypes == ["float32"]:
        assert result.max_abs_weight_diff <= 1e-7 and result.bound == 1e-4
        assert result.flipped == 0 and result.lowest_iou == 1
    else:
        assert 0 < result.max_abs_logit_diff and result.bound == pytest.approx(
            result.max_abs_logit * {"float16": 0.01, "bfloat16": 0.08}[dtype]
        )

    state = read_weights(out)
    key = "sam_mask_decoder.transformer.layers.0.self_attn.v_proj.weight"
    write_weights(out, {**state, key: -state[key]}, out.suffix[1:])
    assert not compare_merged(out, folder / "base.pt", facts.adapter, NANO).passed
    write_weights(out, read_weights(folder / "base.pt"), out.suffix[1:])
    unmerged = compare_merged(out, folder / "base.pt", facts.adapter, NANO)
    assert not unmerged.passed and unmerged.max_abs_weight_diff > 0.01 and unmerged.flipped > 0


def test_a_failed_proof_is_an_error(folder, tmp_path):
    args = Namespace(out=tmp_path / "m.pt", base=folder / "base.pt", verify=NANO, image=None)
    merged = merge_files(args.base, folder / "run", args.out)
    write_weights(args.out, read_weights(args.base))
    with pytest.raises(UserError, match="m.pt does not match base and adapter: its mask logits differ by"):
        verify(args, merged, {"kept": 1})
    record = json.loads((tmp_path / "m.pt.json").read_text())
    assert record["kept"] == 1 and record["verify"]["lowest_iou"] < 1 and record["verify"]["config"] == NANO


@pytest.mark.parametrize(
    "options, words",
    [
        (["--weights", "0.5", "0.5"], "--weights has 2 numbers for 1 adapters"),
        (["--verify", "configs/nothing.yaml"], "there is no config 'configs/nothing.yaml'"),
        (
            ["--verify", "configs/sam2/sam2_hiera_t.yaml"],
            "look like configs/sam2_nano.yaml, the model like configs/sam2/",
        ),
        (["--verify", NANO, "--image", "nothing.png"], "cannot read the image nothing.png: the image does not exist"),
        (["--image", "strip.png"], "give --verify CONFIG too"),
        (["--dtype", "float8"], "invalid choice"),
        (["--format", "onnx"], "invalid choice"),
        (["--base", "nothing.pt"], "there is no file nothing.pt"),
        (["--alpha", "3"], "records its alpha"),
    ],
)
def test_mistakes_are_one_sentence(folder, tmp_path, monkeypatch, capsys, repository, options, words):
    monkeypatch.syspath_prepend(repository / "tools")
    import merge_lora

    base = [] if "--base" in options else ["--base", str(folder / "base.pt")]
    with pytest.raises(SystemExit) as caught:
        run_cli(merge_lora.main, [*base, "--adapter", str(folder / "run"), "--out", str(tmp_path / "m.pt"), *options])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and words in message and "Traceback" not in message


@pytest.mark.parametrize("tool", ["merge_lora.py", "export_adapter.py", "unmerge_lora.py", "export_onnx.py"])
def test_help_has_examples(repository, run_python, tool):
    text = run_python([repository / "tools" / tool, "--help"], check=True).stdout
    assert "examples:" in text and f"python tools/{tool}" in text


def test_export_from_a_run_and_with_a_base(folder, tmp_path, monkeypatch, repository, capsys):
    monkeypatch.syspath_prepend(repository / "tools")
    import export_adapter

    run, out = str(folder / "run"), str(tmp_path / "a")
    export_adapter.main([run, out])
    printed = capsys.readouterr().out
    assert "LoRA layers (rank 4), 1 modules trained in full" in printed and "base     base.pt" in printed
    with pytest.raises(UserError, match="give --force"):
        export_adapter.main([run, out])
    export_adapter.main([run, out, "--base", str(folder / "base.pt"), "--force"])
    before, after = load_adapter(folder / "run" / "adapters" / "best"), load_adapter(out)
    assert after.metadata == before.metadata and after.config() == before.config()
    write_weights(tmp_path / "other.pt", build(NANO, seed=3).state_dict())
    with pytest.raises(UserError, match="give the right --base"):
        export_adapter.main([run, str(tmp_path / "b"), "--base", str(tmp_path / "other.pt")])
    assert not (tmp_path / "b").exists()


def test_the_base_is_named_by_its_identity_where_its_path_is_not_known(tmp_path, capsys):
    """Not as missing: the adapter has what its base is checked by."""
    from sam2_lora_ext.commands.export_adapter import main

    model = build_lora_model(build(NANO), {"rank": 2})
    for facts, words in (
        ({"base_id": "ab" * 32}, f"SHA-256 of its values {'ab' * 32}"),
        ({}, "not recorded; give --base"),
    ):
        save_adapter(Adapter.from_model(model, facts), tmp_path / "from", force=True)
        main([str(tmp_path / "from"), str(tmp_path / "to"), "--force"])
        assert f"base     {words}" in capsys.readouterr().out


def test_export_from_a_checkpoint_notes_its_base(folder, tmp_path, monkeypatch, repository, capsys):
    monkeypatch.syspath_prepend(repository / "tools")
    import export_adapter

    model = build_lora_model(build(NANO), {"rank": 2, "alpha": 6, "trainable": [HEAD]})
    train_a_little(model)
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pt")  # as the plain Trainer saves
    export_adapter.main(
        [str(tmp_path / "checkpoint.pt"), str(tmp_path / "a"), "--alpha", "6", "--base", str(folder / "base.pt")]
    )
    adapter = load_adapter(tmp_path / "a")
    assert adapter.metadata == {
        "base_id": weights_id(read_weights(folder / "base.pt")),
        "model_config": NANO,
        "base_path": str(folder / "base.pt"),
    }
    assert {name.rpartition(".layers")[0] for name in adapter.full_modules} == {HEAD}
    assert f"base     {folder / 'base.pt'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_alpha"] == 6


def test_images(tmp_path):
    Image.new("L", (300, 20), 255).save(tmp_path / "grey.png")
    pixels = read_image(tmp_path / "grey.png", 64)
    assert pixels.shape == noise_image(64).shape == (1, 3, 64, 64)
    white = [(1 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(white))
    assert torch.equal(noise_image(64), noise_image(64)) and noise_image(64).std() > 0.3
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match="cannot read the image .*text.jpg"):
        read_image(tmp_path / "text.jpg", 64)


def test_iou_of_masks():
    one = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]]).bool()
    other = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]).bool()
    torch.testing.assert_close(mask_ious(one, other), torch.tensor([1 / 3, 1.0, 0.0], dtype=torch.float64))
