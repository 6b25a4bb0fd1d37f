"""LeanLoRALinear under `torch.compile` and `DistributedDataParallel`."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from helpers.lora_pairs import QKV, pair


@pytest.mark.parametrize("parts", [(True,), QKV, (True,) * 3])
def test_compiles_as_one_graph(parts):
    torch._dynamo.reset()
    for dropout in (0.0, 0.1, 0.2):  # another one in the same process must not become a symbol
        _, lean = pair(torch.float32, parts, dropout=dropout)
        compiled = torch.compile(copy.deepcopy(lean), fullgraph=True, backend="aot_eager")
        results = []
        for layer in (compiled, lean):
            torch.manual_seed(4)
            x = torch.ones(8, 12, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            results.append([y, x.grad, layer.lora_a.grad, layer.lora_b.grad])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    _, lean = pair()
    inputs = [torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    parallel = nn.parallel.DistributedDataParallel(lean)  # a name, for its hooks die with it
    parallel(inputs[rank]).square().mean().backward()
    _, alone = pair()
    (alone(torch.stack(inputs)).square().mean()).backward()
    torch.testing.assert_close(lean.lora_a.grad, alone.lora_a.grad)
    torch.testing.assert_close(lean.lora_b.grad, alone.lora_b.grad)
    dist.destroy_process_group()


def test_two_ranks_average_their_gradients(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
