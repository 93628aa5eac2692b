"""One rank: runs every collective over both transports and saves what it got."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moq.inference.distributed import broadcast_text, connect

SIZES = [0, 1, 97, 4099, 70001]  # the last one is longer than a chunk of shared memory


def contribution(rank: int, count: int) -> torch.Tensor:
    """Numbers of very different sizes, so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(1000 * rank + count)
    return torch.randn(count, generator=generator) * torch.logspace(-6, 6, count)


def run_all(communicator) -> dict:
    rank, size = communicator.rank, communicator.size
    results = {"rank": rank, "size": size, "transport": communicator.transport}
    for count in SIZES:
        for name in ("all_reduce_sum", "all_reduce_max"):
            tensor = contribution(rank, count)
            getattr(communicator, name)(tensor)
            results[name, count] = tensor
    with_nan = torch.tensor([float("nan") if rank == 1 else 0.0, float(rank)])
    communicator.all_reduce_max(with_nan)
    results["max_with_nan"] = with_nan
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.uint8):
        tensor = torch.arange(7).add(rank).to(dtype)
        communicator.broadcast(tensor, size - 1)
        results["broadcast", str(dtype)] = tensor
    results["text"] = broadcast_text(communicator, f"rank {rank}: 北京")
    widths = [3 * r for r in range(size)]
    shard = torch.arange(5.0)[:, None] * 100 + rank * 10 + torch.arange(3.0 * rank)
    results["gather"] = communicator.all_gather_columns(shard, widths)
    communicator.barrier()
    return results


def main() -> None:
    directory, starter = Path(sys.argv[1]), sys.argv[2]
    groups = {"world": None}
    if starter == "caller":
        dist.init_process_group("gloo")
        ends = [0, dist.get_world_size() - 1]
        subgroup = dist.new_group(ends)
        if dist.get_rank() in ends:
            groups["subgroup"] = subgroup
    for name, group in groups.items():
        results = {
            transport: run_all(connect(group=group, transport=transport))
            for transport in ("shared_memory", "c10d")
        }
        results["auto"] = connect(group=group).transport
        torch.save(results, directory / f"{name}{results['c10d']['rank']}.pt")


if __name__ == "__main__":
    main()
