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


@pytest.mark.parametrize("wanted", [True, False])
def test_nothing_is_computed_again_outside_of_a_block(wanted):
    """Not before, not after an error in one, and not in one that is not wanted."""
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(ZeroDivisionError), recomputing(wanted):
        gone = weakref.ref(recomputed(x * 2, lambda x: x * 2, x))
        assert (gone() is not None) == wanted
        1 / 0
    assert gone() is None
    outside = recomputed(x * 2, lambda x: 1 / 0, x)
    assert torch.equal(torch.autograd.grad(outside.square().sum(), x)[0], 8 * x.detach())


@pytest.mark.parametrize("part", [slice(1, 3), slice(None)])
def test_what_is_made_of_a_part_of_a_result(part):
    def function(x):
        first = recomputed(x.sin(), torch.sin, x)
        second = recomputed(first[part] * 3, lambda first: first * 3, first[part])
        return second.square() + cast(first[part], torch.bfloat16).square()

    x = torch.randn(5, 6)
    expected = kept_and_gradients(function, x)
    got = kept_and_gradients(function, x, selective=True)
    assert got[0] == 0 < expected[0] and all(map(torch.equal, got[1:], expected[1:]))


def test_a_result_that_is_a_view_of_its_source():
    def function(x):
        first = recomputed(x.sin(), torch.sin, x)
        return recomputed(first.view(6, 5), lambda first: first.view(6, 5), first).square()

    x = torch.randn(5, 6)
    expected = kept_and_gradients(function, x)
    got = kept_and_gradients(function, x, selective=True)
    assert got[0] == 0 and all(map(torch.equal, got[1:], expected[1:]))


@pytest.mark.parametrize("changed", ["kept", "source"])
def test_a_change_in_place_is_an_error_as_it_is_without(changed):
    x = torch.randn(3, requires_grad=True)
    with recomputing():
        kept = x * 2
        source = x + 1
        loss = kept.square().sum() + recomputed(source * 3, lambda source: source * 3, source).square().sum()
    with torch.no_grad():
        {"kept": kept, "source": source}[changed].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_result_that_is_changed_before_it_is_kept_or_seen_as_another_type():
    def changed(x):
        return recomputed(x.sin(), torch.sin, x).add_(5).square()

    def complex_numbers(x):
        y = torch.view_as_complex(recomputed(x.sin(), torch.sin, x).view(3, 2))
        return torch.view_as_real(y * y)

    x = torch.randn(6)
    for function in (changed, complex_numbers):
        got, expected = (kept_and_gradients(function, x, selective=selective) for selective in (True, False))
        assert all(map(torch.equal, got[1:], expected[1:]))


@pytest.mark.parametrize("operation", [torch.exp, torch.relu])
def test_an_operation_that_keeps_its_own_result_does_not_hold_its_graph(operation):
    x = torch.randn(1000, requires_grad=True)
    with LiveBytes([x]) as live:
        with recomputing():
            y = operation(x * 2)
        del y  # no backward, as of what the loss does not read
        assert live.now == 0


def test_a_block_of_which_nothing_is_read_is_free():
    module = block(SelectiveLeanBlock)
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    with LiveBytes([*module.parameters(), x]) as live:
        y = module(x)
        del y
        assert live.now == 0


def test_what_several_read_is_made_once_and_held_until_the_last_has_it():
    """By results made of it too; a second backward pass may make it more often, and holds nothing either."""
    made = []

    def function(x):
        made.append(None)
        return x * 2

    x = torch.randn(1000, requires_grad=True)
    with recomputing():
        first = recomputed(function(x), function, x)
        second = recomputed(first + 1, lambda first: first + 1, first)
        loss = (second.sin() + first.sin() + first[3:].cos().sum()).sum()
        del first, second
    gradients = []
    for _ in range(2):
        made.clear()
        with LiveBytes([x]) as live:
            gradients.append(torch.autograd.grad(loss, x, retain_graph=True)[0])
            assert live.now == x.nbytes
        assert len(made) == 1 or gradients[1:]
    twice = 2 * x.detach()
    wrong_by = gradients[0] - 2 * ((twice + 1).cos() + twice.cos())
    torch.testing.assert_close(wrong_by, torch.cat([torch.zeros(3), -2000 * twice[3:].sin()]))
    assert torch.equal(*gradients)


def test_a_result_without_a_gradient_is_not_kept_either():
    weight = torch.randn(4, requires_grad=True)
    x = torch.randn(5, 4)
    with recomputing(), LiveBytes([x, weight]) as live:
        loss = (recomputed(x.sin(), torch.sin, x) * weight).sum()
    assert live.now == loss.nbytes
    assert torch.equal(torch.autograd.grad(loss, weight)[0], x.sin().sum(0))


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
    if "mlp.layers.*" in targets:
        block.norm1.requires_grad_()
        block.norm2.requires_grad_()
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


@pytest.mark.parametrize("targets", [("attn.qkv", "attn.proj"), ("attn.*", "mlp.layers.*", "*proj"), ("mlp.layers.1",)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("stage_begins", [False, True])
@pytest.mark.parametrize(("window", "side"), [(4, 8), (4, 6), (0, 6), (4, 4)])
def test_a_selective_block_equals_the_block_to_the_bit_and_keeps_less(window, side, stage_begins, autocast, targets):
    modules = [block(kind, window, stage_begins, targets) for kind in (LeanBlock, SelectiveLeanBlock)]
    (much, *expected), (little, *got) = (trained(module, side, autocast) for module in modules)
    assert len(got) == len(expected) > 3 and all(map(torch.equal, got, expected))
    assert little < much


def test_what_a_selective_block_keeps():
    """The windows' copy of the first norm, of 8 channels, is not; the rest of the block is."""
    kept = {kind: trained(block(kind, dropout=0.0), 8)[0] for kind in (LeanBlock, SelectiveLeanBlock, CheckpointedLeanBlock)}
    channels = 2 * 8 * 8 * 4  # bytes of one channel
    assert kept[LeanBlock] - kept[SelectiveLeanBlock] == channels * 8
    assert kept[CheckpointedLeanBlock] == 0 < channels * 8 * 5 < kept[SelectiveLeanBlock]


@pytest.mark.parametrize("side", [8, 6])
def test_compiled(side):
    compiled = block(SelectiveLeanBlock)
    expected = trained(copy.deepcopy(compiled).eval(), side)
    compiled.eval().forward = torch.compile(compiled.forward, backend="aot_eager", fullgraph=True)
    for got, value in zip(trained(compiled, side, count=False)[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, value)
