"""The frozen MLP in pieces against SAM 2's own, and what it keeps and computes."""

import copy
import functools

import pytest
import torch
from sam2.modeling.backbones.hieradet import MultiScaleBlock
from sam2.modeling.sam2_utils import MLP
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import LiveBytes, Saved
from sam2_lora_ext.lean.blocks import LeanBlock
from sam2_lora_ext.lean.memory import CheckpointedLeanBlock
from sam2_lora_ext.lean.mlp import frozen_mlp, is_frozen


def make_mlp(dtype=torch.float32, width=8, bias=True):
    torch.manual_seed(0)
    mlp = MLP(width, 4 * width, width, 2, activation=nn.GELU).to(dtype).requires_grad_(False)
    if not bias:
        for layer in mlp.layers:
            layer.bias = None
    return mlp


def result_and_gradient(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return y, *torch.autograd.grad(y, x, weights.to(y))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 4, 8), (0, 8), (2, 0, 3, 8)])
@pytest.mark.parametrize("chunk", [1, 3 * 32, 2**20])
@pytest.mark.parametrize("keeps_hidden", [False, True])
def test_equals_sam2s_in_double_precision(keeps_hidden, chunk, shape, bias, monkeypatch):
    monkeypatch.setattr("sam2_lora_ext.lean.mlp.CPU_CHUNK", chunk)
    mlp = make_mlp(torch.float64, bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    lean = functools.partial(frozen_mlp, mlp, keeps_hidden=keeps_hidden)
    for got, expected in zip(*(result_and_gradient(f, x) for f in (lean, mlp)), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(lean(x), result_and_gradient(lean, x)[0])  # without a gradient


@pytest.mark.parametrize("keeps_hidden", [False, True])
def test_strided_tokens(keeps_hidden):
    mlp, x = make_mlp(torch.float64), torch.randn(4, 8, 6, dtype=torch.float64).transpose(1, 2)
    lean = functools.partial(frozen_mlp, mlp, keeps_hidden=keeps_hidden)
    for got, expected in zip(*(result_and_gradient(f, x) for f in (lean, mlp)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("keeps_hidden", [False, True])
def test_in_one_piece_it_is_sam2s_to_the_bit_also_under_autocast(keeps_hidden):
    mlp, x = make_mlp(), torch.randn(4, 6, 8)
    lean = functools.partial(frozen_mlp, mlp, keeps_hidden=keeps_hidden)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, expected = (result_and_gradient(f, x) for f in (lean, mlp))
        assert got[0].dtype == (torch.bfloat16 if autocast else torch.float32)
        assert all(map(torch.equal, got, expected))


def test_it_keeps_its_input_and_its_hidden_layer_is_never_there(monkeypatch):
    monkeypatch.setattr("sam2_lora_ext.lean.mlp.CPU_CHUNK", 10 * 32)
    mlp, x = make_mlp(), torch.randn(1000, 8, requires_grad=True)
    with Saved(mlp.parameters()) as saved:
        frozen_mlp(mlp, x)
    assert saved.total == x.nbytes
    with Saved(mlp.parameters()) as saved:
        frozen_mlp(mlp, x, keeps_hidden=True)
    assert saved.total == 4 * x.nbytes
    with LiveBytes([x, *mlp.parameters()]) as live, torch.no_grad():  # nor where nobody will ask for it
        frozen_mlp(mlp, x, keeps_hidden=True)
    assert live.peak < 1.5 * x.nbytes
    with LiveBytes([x, *mlp.parameters()]) as live:
        y = frozen_mlp(mlp, x)
        torch.autograd.grad(y.sum(), x)
    assert live.peak < 4.5 * x.nbytes  # y in pieces and whole, dy, dx


def test_a_checkpointed_block_computes_of_its_mlp_the_hidden_layer_alone_again():
    torch.manual_seed(0)
    block = MultiScaleBlock(8, 8, 2, window_size=4).requires_grad_(False)
    flops = {}
    for kind in (LeanBlock, CheckpointedLeanBlock):
        block.__class__ = kind
        x = torch.randn(1, 8, 8, 8, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            block(x).sum().backward()
        flops[kind] = counter.get_total_flops()
    assert flops[CheckpointedLeanBlock] - flops[LeanBlock] == 2 * 64 * 8 * (24 + 8 + 32)  # 64 tokens: qkv, proj, hidden layer


def test_what_is_trained_adapted_or_made_otherwise_goes_sam2s_way():
    assert is_frozen(make_mlp())
    trained = make_mlp()
    trained.layers[1].bias.requires_grad_()
    adapted = make_mlp()
    adapted.layers[0].__class__ = type("Adapted", (nn.Linear,), {})
    others = [MLP(8, 32, 8, 2), MLP(8, 32, 16, 2, nn.GELU), MLP(8, 32, 8, 3, nn.GELU), MLP(8, 32, 8, 2, nn.GELU, True)]
    approximate = make_mlp()
    approximate.act = nn.GELU("tanh")
    assert not any(map(is_frozen, [trained, adapted, approximate, *[other.requires_grad_(False) for other in others]]))


@pytest.mark.parametrize("keeps_hidden", [False, True])
def test_backward_under_autocast(keeps_hidden):
    mlp, x = make_mlp(), torch.randn(5, 8, requires_grad=True)
    y = frozen_mlp(mlp, x, keeps_hidden)
    expected = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("keeps_hidden", [False, True])
def test_checkpoints_copies_and_compilation(keeps_hidden, monkeypatch):
    monkeypatch.setattr("sam2_lora_ext.lean.mlp.CPU_CHUNK", 2 * 32)
    mlp, x = make_mlp(), torch.randn(6, 8)
    expected = result_and_gradient(mlp, x)
    lean = functools.partial(frozen_mlp, mlp, keeps_hidden=keeps_hidden)
    compiled = torch.compile(lambda x: frozen_mlp(mlp, x, keeps_hidden), backend="aot_eager", fullgraph=True)
    checkpointed, copied = (lambda x: checkpoint(lean, x, use_reentrant=False)), (lambda x: frozen_mlp(copy.deepcopy(mlp), x, keeps_hidden))
    for function in (checkpointed, copied, compiled):
        for got, value in zip(result_and_gradient(function, x), expected, strict=True):
            torch.testing.assert_close(got, value)
