"""The checks of test_ranks_apart.py, as one rank of a job of four makes them.

As a program: DIRECTORY RANK WORLD_SIZE BACKEND; writes {check: error or ""} into the directory.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import Decoder, batch, loss_of, train_step, wrap
from torch.distributed.fsdp import fully_shard
from workers.job import run_checks

import moq

STATIC = {
    "start_bits": 8,
    "target_bits": 8,
    "schedule": {"period": 1},
    "activations": "static",
}
STEPS = 4


def everywhere(value: object) -> list:
    """The values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mesh_of_stages() -> dist.DeviceMesh:
    """Two stages of a pipeline, each trained by half of the ranks."""
    shape = (2, dist.get_world_size() // 2)
    return dist.init_device_mesh("cpu", shape, mesh_dim_names=("stage", "data"))


def part_of(stage: int) -> Decoder:
    """The model of a stage; stages have other layers, and other numbers of them."""
    torch.manual_seed(stage)
    return Decoder(layers=2 - stage, hidden=12, intermediate=20)


def seen_alone(model: Decoder) -> dict[str, float]:
    """What each layer sees of this rank's first batch."""
    optimizer = wrap(model, STATIC, STEPS)
    loss_of(model, batch(dist.get_rank())).backward()
    return {name: float(q.seen) for name, q in optimizer._activations.by_name.items()}


def averages(optimizer: moq.MoQOptimizer) -> dict[str, float]:
    return optimizer._activations.state()


def require_shared(model: nn.Module, optimizer: moq.MoQOptimizer, alone: Decoder, key) -> None:
    """Trains a step, and requires what the ranks of the same key have seen together."""
    mine = seen_alone(alone)
    train_step(model, optimizer, dist.get_rank())
    same = [seen for other, seen in everywhere((key, mine)) if other == key]
    assert len(same) > 1
    assert averages(optimizer) == {name: max(seen[name] for seen in same) for name in mine}


def check_a_rank_that_trains_a_model_of_its_own_waits_for_nobody() -> None:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    config = STATIC | ({} if rank % 2 == 0 else {"activations": "dynamic"})
    model = Decoder(layers=1 + rank)
    optimizer = wrap(model, config, 2 * STEPS, process_group=dist.new_subgroups(1)[0])
    for step in range(1 + rank):
        train_step(model, optimizer, step)
    assert optimizer.steps == 1 + rank
    assert len(averages(optimizer)) == (6 * (1 + rank) if rank % 2 == 0 else 0)


def check_ranks_that_nothing_tells_of_are_asked_for_before_the_step() -> None:
    model = part_of(dist.get_rank() % 2)
    optimizer = wrap(model, STATIC, STEPS)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, batch(0)).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "process_group=" in str(error) and "layers.0.q_proj" in str(error)
    else:
        raise AssertionError("ranges of unrelated models were mixed")
    assert optimizer.steps == 0
    assert all(map(torch.equal, before, model.parameters()))


def check_a_sharded_layer_is_of_the_ranks_of_its_mesh() -> None:
    mesh = mesh_of_stages()
    stage = mesh.get_local_rank("stage")
    model = part_of(stage)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    require_shared(model, wrap(model, STATIC, STEPS), part_of(stage), stage)


def check_a_layer_on_a_mesh_of_two_dimensions_is_of_all_its_ranks() -> None:
    model = fully_shard(part_of(0), mesh=mesh_of_stages())
    require_shared(model, wrap(model, STATIC, STEPS), part_of(0), 0)


def check_a_stage_of_one_rank_is_alone() -> None:
    shape = (dist.get_world_size(), 1)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("stage", "data"))
    if dist.get_rank() % 2:  # the others go on
        return
    model = fully_shard(part_of(0), mesh=mesh["data"])
    optimizer = wrap(model, STATIC, STEPS)
    train_step(model, optimizer, dist.get_rank())
    assert averages(optimizer) == seen_alone(part_of(0))


def check_a_replica_is_of_the_group_of_its_ddp() -> None:
    mesh = mesh_of_stages()
    stage, group = mesh.get_local_rank("stage"), mesh.get_group("data")
    model = nn.parallel.DistributedDataParallel(part_of(stage), process_group=group)
    require_shared(model, wrap(model, STATIC, STEPS), part_of(stage), stage)


def check_a_ddp_that_is_made_after_the_optimizer_is_found() -> None:
    mesh = mesh_of_stages()
    stage, group = mesh.get_local_rank("stage"), mesh.get_group("data")
    model = part_of(stage)
    optimizer = wrap(model, STATIC, STEPS)
    around = nn.ModuleDict({"inside": model})
    around.forward = model.forward
    outer = nn.parallel.DistributedDataParallel(around, process_group=group)
    outer = torch.compile(outer, backend="eager")
    require_shared(outer, optimizer, part_of(stage), stage)


def check_a_group_that_is_given_counts() -> None:
    model = part_of(0)
    optimizer = wrap(model, STATIC, STEPS, process_group=dist.group.WORLD)
    require_shared(model, optimizer, part_of(0), 0)


def check_only_a_process_group_is_taken() -> None:
    mesh = mesh_of_stages()
    try:
        wrap(part_of(0), STATIC, STEPS, process_group=mesh["data"])
    except TypeError as error:
        assert "process_group must be a torch.distributed.ProcessGroup, got DeviceMesh" in str(
            error
        )
    else:
        raise AssertionError("a mesh was taken")


if __name__ == "__main__":
    where, own_rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    found = run_checks(globals(), where, own_rank, ranks, sys.argv[4])
    (where / f"results-{own_rank}.json").write_text(json.dumps(found))
    # Not through the interpreter's exit: under load torch's own threads may outlive what they use.
    os._exit(0)
