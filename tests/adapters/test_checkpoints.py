"""Weight files: valid and refused ones, identities independent of precision and adapters, and the SAM 2 of a file."""

import os
import pickle

import pytest
import torch
from torch import nn

from helpers.stock_models import NANO, TINY, build
from sam2_lora_ext.adapters.weights import explain_mismatch, identify, read_weights, weights_id, write_weights
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.utils.errors import UserError

STOCK = [f"configs/sam2{minor}/sam2{minor}_hiera_{size}.yaml" for minor in ("", ".1") for size in ("t", "s", "b+", "l")]


@pytest.fixture(scope="module")
def nano() -> dict[str, torch.Tensor]:
    """The state dict of the small SAM 2; not to be changed."""
    return build(NANO).state_dict()


@pytest.mark.parametrize(
    "save",
    [
        lambda state, path: torch.save({"model": state, "epoch": 3}, path),
        lambda state, path: torch.save(state, path),
        lambda state, path: torch.save({"model": state}, path, _use_new_zipfile_serialization=False),
        lambda state, path: write_weights(path, state),
        lambda state, path: write_weights(path, state, "safetensors"),
    ],
    ids=["trainer", "bare", "old torch", "ours", "safetensors"],
)
def test_every_layout_is_read(nano, tmp_path, save, request):
    path = tmp_path / ("w.safetensors" if "safetensors" in request.node.callspec.id else "w.pt")
    save(nano, path)
    state = read_weights(path)
    assert state.keys() == nano.keys() and all(torch.equal(value, nano[key]) for key, value in state.items())


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


BROKEN = {
    "folder.pt": (lambda path: path.mkdir(), "is a folder"),
    "missing.pt": (lambda path: None, "there is no file"),
    "empty.pt": (lambda path: path.touch(), "is empty"),
    "empty.safetensors": (lambda path: path.touch(), "is empty"),
    "text.pt": (lambda path: path.write_text("hello"), "is damaged or not a file of weights"),
    "text.safetensors": (lambda path: path.write_text("hello, hello"), "is damaged or not a safetensors"),
    "html.pt": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "is damaged or not a file"),
    "evil.pt": (lambda path: torch.save({"model": Evil()}, path), "run code when they are loaded"),
    "evil.pkl": (lambda path: path.write_bytes(pickle.dumps(Evil(), 2)), "run code when they are loaded"),
    "module.pt": (lambda path: torch.save(nn.Linear(1, 1), path), "run code when they are loaded"),
    "nothing.pt": (lambda path: torch.save({"model": {}}, path), "holds no weights: its state dict is empty"),
    "list.pt": (lambda path: torch.save([torch.zeros(1)], path), "holds no state dict: it holds a list"),
    "tensor.pt": (lambda path: torch.save(torch.zeros(1), path), "holds no state dict: it holds a Tensor"),
    "number.pt": (lambda path: torch.save({"model": {"a": 1}}, path), "the key 'a' has a int, expected named tensors"),
    "other.pt": (lambda path: torch.save({"state": {"a": torch.zeros(1)}}, path), "the key 'state' has a dict"),
    "key.pt": (lambda path: torch.save({1: torch.zeros(1)}, path), "the key '1' has a Tensor, expected named tensors"),
    "sparse.pt": (lambda path: torch.save({"a": torch.zeros(2, 2).to_sparse()}, path), "a as a sparse"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_sentence(tmp_path, monkeypatch, name):
    make, words = BROKEN[name]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    with pytest.raises(UserError, match=words) as caught:
        read_weights(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("keep", [1, 9, 100, 0.5, 0.99])
def test_truncated_files_are_refused(nano, tmp_path, suffix, keep):
    path = tmp_path / f"w.{suffix}"
    write_weights(path, nano, suffix)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UserError, match="is damaged"):
        read_weights(path)


def test_a_full_disk_leaves_the_old_file(tmp_path, run_python):
    """A file size limit simulates the full disk; it is set in a child process, since it cannot be raised again."""
    path = tmp_path / "w.pt"
    write_weights(path, {"a": torch.ones(3)})
    for suffix in ("pt", "safetensors"):
        code = (
            "import resource, signal, torch\n"
            "from sam2_lora_ext.adapters.weights import write_weights\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
            f"write_weights({str(path)!r}, {{'a': torch.zeros(1_000_000)}}, {suffix!r})\n"
        )
        done = run_python(["-c", code])
        assert done.returncode and "UserError: cannot write" in done.stderr.splitlines()[-1], done.stderr
    assert torch.equal(read_weights(path)["a"], torch.ones(3)) and os.listdir(tmp_path) == ["w.pt"]


def test_an_existing_file_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "new folder" / "w.pt"
    write_weights(path, {"a": torch.ones(1)}, force=False)
    with pytest.raises(UserError, match="exists already"):
        write_weights(path, {"a": torch.zeros(1)}, force=False)
    write_weights(path, {"a": torch.zeros(2)})
    assert read_weights(path)["a"].shape == (2,)


def test_the_identity_is_of_names_shapes_and_values():
    state = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2])}
    same = [
        {"a": state["a"], "b": state["b"]},  # another order
        {key: value.half() for key, value in state.items()},  # exact in half precision
        {key: value.double() for key, value in state.items()},
        {**state, "b": torch.arange(6.0).reshape(3, 2).t().contiguous().t().reshape(2, 3)},
        {**state, "b": state["b"].t().contiguous().t()},  # not contiguous
        {**state, "b.lora_a": torch.ones(1), "b.lora_b": torch.ones(1)},
    ]
    others = [
        {**state, "b": state["b"].reshape(3, 2)},
        {**state, "b": state["b"] + 1e-6},
        {"c": state["b"], "a": state["a"]},
        {"a": state["a"]},
        {**state, "c": torch.zeros(0)},
        {**state, "b": state["b"].flip(0)},
    ]
    identity = weights_id(state)
    assert len(identity) == 64 and all(weights_id(other) == identity for other in same)
    assert len({identity, *map(weights_id, others)}) == 1 + len(others)


def test_the_identity_is_the_same_before_and_after_injection_and_a_round_trip_through_half(nano, tmp_path):
    half = {key: value.half() for key, value in nano.items()}
    write_weights(tmp_path / "half.pt", half)
    write_weights(tmp_path / "full.safetensors", {key: value.float() for key, value in half.items()}, "safetensors")
    identities = {weights_id(read_weights(tmp_path / name)) for name in ("half.pt", "full.safetensors")}
    model = build(NANO)
    model.load_state_dict(half)
    assert identities == {weights_id(build_lora_model(model, {}).state_dict())} != {weights_id(nano)}


def test_the_identity_takes_bounded_memory(run_python):
    """In a separate process, since the peak memory of this one has been higher before."""
    code = (
        "import resource, torch\n"
        "from sam2_lora_ext.adapters.weights import weights_id\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "weights_id({'a': torch.ones(10_000_000)})\n"
        "state = {'a': torch.ones(80_000_000, dtype=torch.float16)}\n"
        "before = peak(); weights_id(state); print(peak() - before)\n"
    )
    grown = int(run_python(["-c", code], check=True).stdout)
    assert grown < 60_000  # KB; the same values as float32 take 320,000


@pytest.mark.parametrize("config", [*STOCK, NANO])
def test_stock_models_are_recognised(config):
    state = build(config).state_dict()
    assert identify(state) == config
    assert identify({key: value.half() for key, value in state.items()}) == config


def test_other_weights_are_not_recognised(nano):
    assert identify({}) is None and identify({"a": torch.zeros(1)}) is None
    assert identify({key: value for key, value in nano.items() if "blocks.7" not in key}) is None
    assert identify({key: value for key, value in nano.items() if key != "no_obj_embed_spatial"}) is None
    assert identify({**nano, "image_encoder.trunk.pos_embed": torch.zeros(1)}) is None


def test_a_mismatch_names_both_models(nano):
    tiny_21, tiny_20 = build(TINY).state_dict(), build("configs/sam2/sam2_hiera_t.yaml").state_dict()
    assert explain_mismatch(nano, nano) is None
    assert explain_mismatch(tiny_20, build_lora_model(build("configs/sam2/sam2_hiera_t.yaml"), {}).state_dict()) is None
    assert explain_mismatch(tiny_20, tiny_21) == (
        "the weights do not fit the model: they look like configs/sam2/sam2_hiera_t.yaml, the model like "
        "configs/sam2.1/sam2.1_hiera_t.yaml (they lack no_obj_embed_spatial and 2 more); "
        "use config and weights of the same model"
    )
    assert "(the model lacks no_obj_embed_spatial and 2 more)" in explain_mismatch(tiny_21, tiny_20)
    words = explain_mismatch(nano, tiny_21)
    assert "look like configs/sam2_nano.yaml" in words
    assert "maskmem_tpos_enc is [4, 1, 1, 16] instead of [7, 1, 1, 64] and 332 more" in words
    half = {key: value for key, value in nano.items() if "memory" not in key}
    assert explain_mismatch(half, nano).endswith("check that it is a whole SAM 2 model")
    assert "no stock SAM 2" in explain_mismatch({"a": torch.zeros(1)}, nano)
