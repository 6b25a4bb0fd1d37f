"""Device discipline without a GPU: forward pass and loss of a step on fake CUDA tensors, where a tensor on the wrong
device raises.

The backward pass does not run there, and the clicks are fixed: `test_clicks_are_made_on_the_device` runs those.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.counting import fake_step
from benchmarks.fake import convert, fake_cuda
from benchmarks.kernels import Kernels
from benchmarks.methods import SAMPLING, Setup, build, make_batch
from sam2_lora_ext.prompts import PromptSampler

IMAGES, OBJECTS = 2, 3
# Kernels of forward pass and loss under the CPU's autocast by those under CUDA's, which keeps norms, sums and softplus
# in float32.
CPU_BY_CUDA = {"full": 0.95, "lean": 0.97}


@pytest.fixture
def few_clicks(monkeypatch):
    """Two prediction steps, not eight."""
    monkeypatch.setitem(SAMPLING, "num_correction_pt_per_frame", 1)


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """One kernel, as on a real card; without one torch splits attention into several."""
    q, k, v = (tensor.to(torch.bfloat16) for tensor in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


def half_a_step(setup: Setup, autocast: bool, warm: bool = False) -> tuple[Tensor, Kernels]:
    """Loss and kernels of forward pass and loss of a nano model on fake CUDA tensors."""
    with fake_cuda(IMAGES * OBJECTS) as mode:
        convert(setup.model, mode, "cuda:0")
        batch = make_batch(128, IMAGES, OBJECTS).to("cuda:0")
        for _ in range(2 if warm else 1):  # the first fills the caches of positions; each has casts of its own
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                if hasattr(setup.model, "hold_weights"):
                    setup.model.hold_weights("cuda")
                with Kernels() as kernels:
                    outputs = setup.model(batch)
                    kernels.phase = "loss"
                    loss = setup.loss_of(outputs, batch)
    return loss, kernels


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", ["full", "lean_fast", "lean_channels", "lean", "lean_memory"])
def test_a_step_stays_on_the_device(method, autocast, few_clicks):
    loss, _ = half_a_step(build(method, "nano", 128), autocast)
    assert loss.device == torch.device("cuda:0") and loss.dtype == torch.float32


def test_a_tensor_on_the_wrong_device_fails(few_clicks):
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(x.shape[-1])  # on the CPU, which only a GPU would notice

    setup = build("full", "nano", 128)
    setup.model.image_encoder.trunk.blocks[0].norm1 = Wrong()
    with pytest.raises(RuntimeError, match="cpu and cuda:0|cuda:0 and cpu"):
        half_a_step(setup, autocast=False)
    setup = build("full", "nano", 128)
    setup.model.image_encoder.trunk.blocks[0].norm1.forward = lambda x: x * x.sum().item()
    with pytest.raises(RuntimeError, match="reads a value back"):
        half_a_step(setup, autocast=False)


def test_clicks_are_made_on_the_device():
    """Nothing is copied there, no value is read back."""
    with FakeTensorMode():
        empty, sound = (
            torch.zeros(2, dtype=torch.bool, device="cuda:0"),
            torch.ones(2, 8, 8, dtype=torch.bool, device="cuda:0"),
        )
        keys = torch.ones(2, dtype=torch.int64, device="cuda:0")
        sampler = PromptSampler(empty, sound, keys, seeded=True, exact_boxes=False)
        masks = torch.ones(2, 1, 8, 8, dtype=torch.bool, device="cuda:0")
        for found in (None, masks):
            points, labels = sampler.next_point(masks, found, "uniform")
            assert points.device == labels.device == torch.device("cuda:0")
            assert points.shape == (2, 1, 2) and points.dtype == torch.float32 and labels.dtype == torch.int32


@pytest.mark.slow
@pytest.mark.parametrize("method", CPU_BY_CUDA)
def test_how_far_the_cpu_s_autocast_is_from_cuda_s(method, few_clicks, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", attention)
        _, cuda = half_a_step(build(method, "nano", 128), autocast=True, warm=True)
    _, _, cpu = fake_step(method, "nano", 128, IMAGES, OBJECTS, autocast=True)
    phases = "forward", "loss"
    assert cpu.total(*phases) / cuda.total(*phases) == pytest.approx(CPU_BY_CUDA[method], abs=0.02)
    assert 0.8 < cpu.moved(*phases) / cuda.moved(*phases) <= 1.0
