"""Hostile and damaged files: each is refused in one sentence, runs no code, and exhausts nothing."""

import contextlib
import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.hostile_files import NAME, Evil, Model, adapter_folder, entry, evil_run, safetensors_of, tensors
from sam2_lora_ext.adapters.merge_state import merge_state_dict
from sam2_lora_ext.adapters.peft import load_adapter, save_adapter
from sam2_lora_ext.adapters.sources import read_adapter
from sam2_lora_ext.adapters.weights import read_weights
from sam2_lora_ext.lora import Adapter, LayerAdapter, attach_adapter
from sam2_lora_ext.run.checkpoint import prepare_resume
from sam2_lora_ext.run.folder import RunFolder
from sam2_lora_ext.utils.errors import UserError

GIGABYTE = 1 << 30


def as_file(name: str, content: bytes) -> Callable[[Path], object]:
    def case(folder: Path) -> object:
        (folder / name).write_bytes(content)
        return read_weights(folder / name)

    return case


def saved(content: object) -> Callable[[Path], object]:
    def case(folder: Path) -> object:
        torch.save(content(folder) if callable(content) else content, folder / "x.pt")
        return read_weights(folder / "x.pt")

    return case


def as_adapter(**changes: object) -> Callable[[Path], object]:
    return lambda folder: attach_adapter(Model(), load_adapter(adapter_folder(folder / "adapter", **changes)))


def with_config(text: bytes) -> Callable[[Path], object]:
    def case(folder: Path) -> object:
        adapter_folder(folder / "adapter")
        (folder / "adapter/adapter_config.json").write_bytes(text)
        return load_adapter(folder / "adapter")

    return case


def with_key(key: str, **more: torch.Tensor) -> Callable[[Path], object]:
    state = {f"{key}.lora_A.weight": torch.ones(2, 6), f"{key}.lora_B.weight": torch.ones(4, 2)}
    return as_adapter(state=state | more)


def evil_pickle(folder: Path) -> object:
    (folder / "x.pt").write_bytes(pickle.dumps({"model": Evil(folder / "trace")}))
    return read_weights(folder / "x.pt")


def evil_adapter_bin(folder: Path) -> object:
    path = adapter_folder(folder / "adapter")
    (path / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil(folder / "trace")}, path / "adapter_model.bin")
    return load_adapter(path)


def evil_checkpoint(folder: Path) -> object:
    torch.save(
        {"model": {}, "optimizer": Evil(folder / "trace"), "epoch": 1, "loss": {}, "steps": {}},
        folder / "checkpoint.pt",
    )
    return prepare_resume(folder, {})


def scripted(folder: Path) -> object:
    torch.jit.script(nn.Linear(2, 2)).save(str(folder / "x.pt"))
    return read_weights(folder / "x.pt")


def run_note(name: str, text: str) -> Callable[[Path], object]:
    def case(folder: Path) -> object:
        (folder / name).write_text(text)
        run = RunFolder(folder, Model(), {}, None, merged=False, flat_files=False, base_path=None)
        return run.name(0.1) if name == "run.json" else run.validations()

    return case


def merged_with(name: str, inputs: int) -> Callable[[Path], object]:
    adapter = Adapter({name: LayerAdapter(torch.ones(2, inputs), torch.ones(4, 2), 4.0)})
    return lambda folder: merge_state_dict(Model().state_dict(), adapter)


def dangling(folder: Path) -> object:
    (folder / "x.pt").symlink_to(folder / "nowhere")
    return read_weights(folder / "x.pt")


GOOD = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["encoder.0"], "bias": "none"})
CASES: dict[str, Callable[[Path], object]] = {
    # weight files of torch
    "no file": lambda folder: read_weights(folder / "none.pt"),
    "a folder": lambda folder: read_weights(folder),
    "a dangling link": dangling,
    "empty": as_file("x.pt", b""),
    "text": as_file("x.pt", b"this is not a model\n"),
    "an HTML page": as_file("x.pt", b"<!DOCTYPE html><html>404</html>"),
    "zeros": as_file("x.pt", bytes(100_000)),
    "a zip of nothing": as_file("x.pt", b"PK\x05\x06" + bytes(18)),
    "a cut zip": as_file("x.pt", b"PK\x03\x04" + bytes(range(256)) * 40),
    "a pickle that runs code": evil_pickle,
    "a torch file that runs code": saved(lambda folder: {"model": {"a": Evil(folder / "trace")}}),
    "code beside the weights": saved(lambda folder: {"model": {"a": torch.ones(1)}, "note": Evil(folder / "trace")}),
    "a pickled module": saved(lambda folder: nn.Linear(2, 2)),
    "a TorchScript archive": scripted,
    "a list": saved([torch.ones(1)]),
    "a tensor": saved(torch.ones(3)),
    "an empty state": saved({"model": {}}),
    "numbers for names": saved({"model": {3: torch.ones(1)}}),
    "words for tensors": saved({"model": {"a": "b"}}),
    "a sparse tensor": saved({"model": {"a": torch.eye(3).to_sparse()}}),
    "a complex tensor": saved({"model": {"a": torch.ones(2, dtype=torch.complex64)}}),
    # safetensors
    "an empty safetensors": as_file("x.safetensors", b""),
    "half a length": as_file("x.safetensors", b"\x10\x00"),
    "a header of 2^63 bytes": as_file("x.safetensors", safetensors_of(b"{}", length=1 << 63)),
    "a header longer than the file": as_file("x.safetensors", safetensors_of(b"{}", length=10_000)),
    "a header of 90 MB promised": as_file("x.safetensors", safetensors_of(b"{", length=90_000_000)),
    "no JSON": as_file("x.safetensors", safetensors_of(b"{hello}")),
    "a deeply nested header": as_file("x.safetensors", safetensors_of(b"[" * 200_000)),
    "a deeply nested object": as_file("x.safetensors", safetensors_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    "offsets past the end": as_file("x.safetensors", safetensors_of(entry("F32", [1 << 40], [0, 1 << 42]), b"1234")),
    "offsets that do not fit the shape": as_file("x.safetensors", safetensors_of(entry(shape=[7]), b"1234")),
    "offsets that run backwards": as_file("x.safetensors", safetensors_of(entry(offsets=[4, 0]), b"1234")),
    "a negative shape": as_file("x.safetensors", safetensors_of(entry(shape=[-1]), b"1234")),
    "a shape that overflows": as_file("x.safetensors", safetensors_of(entry(shape=[1 << 33, 1 << 33]), b"1234")),
    "an unknown dtype": as_file("x.safetensors", safetensors_of(entry(dtype="F1"), b"1234")),
    "a hole in the file": as_file("x.safetensors", safetensors_of(entry(offsets=[4, 8]), b"12345678")),
    # adapter folders
    "no config": lambda folder: load_adapter(folder),
    "a config that is no JSON": with_config(b"hello"),
    "a config of other bytes": with_config(b"\xff\xfe\x00"),
    "a config that is a list": with_config(b"[]"),
    "a deeply nested config": with_config(b"[" * 200_000),
    "another kind of adapter": as_adapter(peft_type="IA3"),
    "DoRA": as_adapter(use_dora=True),
    "trained biases": as_adapter(bias="all"),
    "rank as a word": as_adapter(r="eight"),
    "alpha as a list": as_adapter(lora_alpha=[4]),
    "alpha that is no number": with_config(GOOD.replace('"lora_alpha": 4', '"lora_alpha": NaN').encode()),
    "alpha that is infinite": with_config(GOOD.replace('"lora_alpha": 4', '"lora_alpha": 1e999').encode()),
    "patterns of a wrong kind": as_adapter(rank_pattern=[1]),
    "weights that run code": evil_adapter_bin,
    "a path for a name": with_key("base_model.model.../../../etc/passwd"),
    "an absolute path for a name": with_key("base_model.model./etc/passwd"),
    "a name with a null": with_key("base_model.model.encoder\x00"),
    "a glob for a name": with_key("base_model.model.*"),
    "a name of no module": with_key("base_model.model.decoder.7"),
    "a name of a dunder": with_key("base_model.model.__class__"),
    "a module that is no linear layer": with_key("base_model.model.norm"),
    "a name without PEFT's prefix": with_key("encoder.0"),
    "A without B": as_adapter(state={f"{NAME}.lora_A.weight": torch.ones(2, 6)}),
    "A and B of two ranks": as_adapter(state=tensors(**{f"{NAME}.lora_B.weight": torch.ones(4, 3)})),
    "other sizes than the model's": as_adapter(state=tensors(**{f"{NAME}.lora_A.weight": torch.ones(2, 60)})),
    "A of three dimensions": as_adapter(state=tensors(**{f"{NAME}.lora_A.weight": torch.ones(2, 6, 1)})),
    "NaN": as_adapter(state=tensors(**{f"{NAME}.lora_A.weight": torch.full((2, 6), float("nan"))})),
    "integers": as_adapter(state=tensors(**{f"{NAME}.lora_A.weight": torch.ones(2, 6, dtype=torch.int64)})),
    "no tensor at all": as_adapter(state={}),
    "a note that is no JSON": as_adapter(metadata={"sam2_lora_ext": "{"}),
    "a note of a wrong kind": as_adapter(metadata={"sam2_lora_ext": "[1]"}),
    "a note of impossible parts": as_adapter(
        metadata={"sam2_lora_ext": json.dumps({"fused": {"encoder.0": {"parts": [], "alpha": 1}}})}
    ),
    "a note of parts that are none": as_adapter(
        metadata={"sam2_lora_ext": json.dumps({"fused": {"encoder.0": "all"}})}
    ),
    # runs and merging
    "a checkpoint that runs code": evil_checkpoint,
    "a run that names a target": lambda folder: read_adapter(evil_run(folder)),
    "a damaged run.json": run_note("run.json", "{"),
    "a run.json without a name": run_note("run.json", "{}"),
    "a damaged validations.json": run_note("validations.json", "[{"),
    "a validations.json of numbers": run_note("validations.json", "[1, 2]"),
    "a deeply nested validations.json": run_note("validations.json", "[" * 200_000),
    "an adapter of another model": merged_with("encoder.9", 6),
    "an adapter of other shapes": merged_with("encoder.0", 5),
}


@pytest.fixture
def little_memory():
    """At most two gigabytes more than now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GIGABYTE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_there_are_enough():
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES)
def test_is_refused(case, tmp_path, little_memory):
    with pytest.raises(UserError) as refused:
        CASES[case](tmp_path)
    assert "\n" not in str(refused.value) and 10 < len(str(refused.value)) < 1000
    assert not (tmp_path / "trace").exists()


def test_the_evil_is_evil(tmp_path):
    """Otherwise the above would show nothing."""
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    with contextlib.suppress(RuntimeError):  # no checkpoint, but by then it has run
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "trace").exists()


def test_the_good_ones_are_taken(tmp_path):
    """The same files without the change."""
    adapter = load_adapter(adapter_folder(tmp_path / "adapter"))
    attach_adapter(Model(), adapter)
    merge_state_dict(Model().state_dict(), adapter)
    save_adapter(adapter, tmp_path / "again")
    (tmp_path / "x.safetensors").write_bytes(safetensors_of(entry(), b"1234"))
    assert read_weights(tmp_path / "x.safetensors")["a"].shape == (1,)
