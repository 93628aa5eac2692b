"""The decoder that the ranks of a job train, whole and sharded."""

import torch
import torch.distributed as dist
from tiny_decoder import Decoder, masters
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from workers.job import everywhere

import moq

FALLING = {
    "start_bits": 9,
    "target_bits": 4,
    "rounding": "stochastic",
    "seed": 5,
    "schedule": {"finish_at": 0.8},
}
STEPS = 6
UNEVEN = {"hidden": 11, "intermediate": 5}  # no dimension divides by two


def device() -> torch.device:
    """Where this rank's parameters are: NCCL knows only GPUs."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def whole_decoder(dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(**UNEVEN).to(device(), dtype)


def sharded_decoder(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> Decoder:
    model = whole_decoder(dtype, seed)
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def require_same_weights(model: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(full(p), full(q)), name


def require_equal_replicas(model: nn.Module, optimizer: moq.MoQOptimizer) -> None:
    """Weights, masters, widths and plans are the same on all ranks, bit for bit."""
    kept = [*model.parameters(), *masters(optimizer).values()]
    for p in kept:
        copies = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, p.detach())
        assert all(torch.equal(copy, p) for copy in copies)
    for other in everywhere((optimizer.num_bits, optimizer.schedule().plan(), optimizer.steps)):
        assert other == (optimizer.num_bits, optimizer.schedule().plan(), optimizer.steps)
