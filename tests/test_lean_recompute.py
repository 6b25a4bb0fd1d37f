"""What is computed again in backward is what was not kept: the same bits, of views and casts too, and memory that is free."""

import contextlib
import copy
import weakref

import pytest
import torch
from sam2.modeling.backbones.hieradet import MultiScaleBlock
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import LiveBytes
from sam2_lora_ext.lean.blocks import LeanBlock
from sam2_lora_ext.lean.memory import CheckpointedLeanBlock, SelectiveLeanBlock
from sam2_lora_ext.lean.recompute import cast, recomputed, recomputing
from sam2_lora_ext.lora import build_lora_model

pytestmark = pytest.mark.usefixtures("lean_however_small")


def kept_and_gradients(function, *inputs, selective=False):
    """Bytes that wait for backward, the result, and the gradients of the inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with LiveBytes(leaves) as live:
        with recomputing() if selective else contextlib.nullcontext():
            y = function(*leaves)
        kept = live.now - y.nbytes
    torch.manual_seed(7)
    return kept, y, *torch.autograd.grad(y, leaves, torch.randn_like(y))


def test_a_result_of_a_result_and_a_view_of_it():
    def function(x, weight):
        first = recomputed(x.sin(), torch.sin, x)
        second = recomputed(first + 1, lambda first: first + 1, first)
        return second[1:, 2:].t() * weight

    x, weight = torch.randn(5, 6), torch.randn(4, 4)
    expected = kept_and_gradients(function, x, weight)
    got = kept_and_gradients(function, x, weight, selective=True)
    assert expected[0] == x.nbytes and got[0] == 0
    assert all(map(torch.equal, got[1:], expected[1:]))


def test_nothing_holds_on_to_a_result_after_the_block():
    x = torch.randn(3, requires_grad=True)
    with recomputing():
        result = recomputed(x * 2, lambda x: x * 2, x)
        gone = weakref.ref(result)
        loss = result.square().sum()
        del result
        assert gone() is not None  # its storage must not become another's
    assert gone() is None
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], 8 * x.detach())
    outside = recomputed(x * 2, lambda x: 1 / 0, x)
    assert torch.equal(torch.autograd.grad(outside.square().sum(), x)[0], 8 * x.detach())


def test_an_error_ends_the_block():
    with pytest.raises(ZeroDivisionError), recomputing():
        1 / 0
    x = torch.randn(3, requires_grad=True)
    torch.autograd.grad(recomputed(x.exp(), lambda x: 1 / 0, x).square().sum(), x)


def test_a_cast_is_kept_where_its_source_is():
    def function(x):
        return cast(recomputed(x.sin(), torch.sin, x), torch.bfloat16).square()

    def of_kept(x):
        return cast(x, torch.bfloat16).square()

    x = torch.randn(4, 8)
    expected = kept_and_gradients(function, x)
    got, of_kept = (kept_and_gradients(f, x, selective=True) for f in (function, of_kept))
    assert all(map(torch.equal, got[1:], expected[1:])) and (got[0], expected[0]) == (0, x.nbytes // 2)
    assert of_kept[0] == x.nbytes // 2 and cast(x, x.dtype) is x


def test_checkpointing_inside():
    def function(x):
        return checkpoint(lambda x: recomputed(x.sin(), torch.sin, x).square().sin(), x, use_reentrant=False)

    x = torch.randn(4)
    got, expected = (kept_and_gradients(function, x, selective=selective) for selective in (True, False))
    assert all(map(torch.equal, got[1:], expected[1:])) and got[0] == expected[0] == 0


def block(kind, tokens_of_window=4, stage_begins=False, targets=("attn.qkv", "attn.proj"), dropout=0.3):
    torch.manual_seed(0)
    block = MultiScaleBlock(8, 16 if stage_begins else 8, 2, window_size=tokens_of_window, q_stride=(2, 2) if stage_begins else None)
    build_lora_model(block, {"targets": list(targets), "rank": 2, "dropout": dropout, "implementation": "lean"})
    for name, parameter in block.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    block.__class__ = kind
    return block


def trained(block, side, autocast=False, count=True):
    """What `block` keeps of a random map, and its result and all gradients."""
    x = torch.randn(2, side, side, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.manual_seed(2)
    live = LiveBytes([*block.parameters(), x])
    with live if count else contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x)
        kept = live.now - y.nbytes
    return kept, y, *torch.autograd.grad(y, [x, *[p for p in block.parameters() if p.requires_grad]], torch.ones_like(y))


@pytest.mark.parametrize("targets", [("attn.qkv", "attn.proj"), ("attn.*", "mlp.layers.*"), ("mlp.layers.1",)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("stage_begins", [False, True])
@pytest.mark.parametrize(("window", "side"), [(4, 8), (4, 6), (0, 6), (4, 4)])
def test_a_selective_block_equals_the_block_to_the_bit_and_keeps_less(window, side, stage_begins, autocast, targets):
    modules = [block(kind, window, stage_begins, targets) for kind in (LeanBlock, SelectiveLeanBlock)]
    (much, *expected), (little, *got) = (trained(module, side, autocast) for module in modules)
    assert len(got) == len(expected) > 3 and all(map(torch.equal, got, expected))
    assert little < much


def test_what_a_selective_block_keeps():
    """The windows' copy of the first norm, of 8 channels, and the hidden layer, of 32, are not; the rest of the block is."""
    kept = {kind: trained(block(kind, dropout=0.0), 8)[0] for kind in (LeanBlock, SelectiveLeanBlock, CheckpointedLeanBlock)}
    channels = 2 * 8 * 8 * 4  # bytes of one channel
    assert kept[LeanBlock] - kept[SelectiveLeanBlock] == channels * (8 + 32)
    assert kept[CheckpointedLeanBlock] == 0 < channels * 8 * 5 < kept[SelectiveLeanBlock]


def test_compiled():
    compiled = block(SelectiveLeanBlock)
    expected = trained(copy.deepcopy(compiled).eval(), 8)
    compiled.eval().forward = torch.compile(compiled.forward, backend="aot_eager", fullgraph=True)
    for got, value in zip(trained(compiled, 8, count=False)[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, value)
