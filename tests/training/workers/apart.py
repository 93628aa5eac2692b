"""The checks of test_ranks_apart.py, as one rank of a job of four makes them.

As a program: DIRECTORY RANK WORLD_SIZE BACKEND; writes {check: error or ""} into the directory.
"""

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_decoder import Decoder, batch, loss_of, train_step, wrap
from torch.distributed.fsdp import fully_shard
from workers.job import everywhere, main

import moq
from moq.collective import all_gather
from moq.integrations import Training

STATIC = {
    "start_bits": 8,
    "target_bits": 8,
    "schedule": {"period": 1},
    "activations": "static",
}
STEPS = 4


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
    return {name: float(q.seen.amax()) for name, q in optimizer._activations.by_name.items()}


def averages(optimizer: moq.MoQOptimizer) -> dict[str, float]:
    return optimizer._activations.state()


def require_shared(model: nn.Module, optimizer: moq.MoQOptimizer, alone: Decoder, key) -> None:
    """Trains a step, and requires what the ranks of the same key have seen together."""
    mine = seen_alone(alone)
    train_step(model, optimizer, dist.get_rank())
    same = [seen for other, seen in everywhere((key, mine)) if other == key]
    assert len(same) > 1
    assert averages(optimizer) == {name: max(seen[name] for seen in same) for name in mine}


def check_ranks_tell_each_other_things_without_tensors_of_pythons() -> None:
    """A thread of gloo's that drops one of those while the interpreter exits ends the process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = {"rank": rank, "value": 0.1 * rank, "long": "x" * 1000 * rank}
    with mock.patch.object(dist, "all_gather_object", side_effect=AssertionError):
        everyone = all_gather(own)
        pair = all_gather(own, pairs[rank // 2])
        assert all_gather(None) == [None] * ranks
    assert [other["rank"] for other in everyone] == list(range(ranks))
    assert everyone[rank] == own and [len(other["long"]) for other in everyone][1] == 1000
    assert pair == everyone[rank // 2 * 2 : rank // 2 * 2 + 2]


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


def check_frozen_scales_are_sent_to_nobody() -> None:
    config = STATIC | {"observer": {"freeze_at": 0.5}}
    plain = part_of(0)
    optimizer = wrap(plain, config, STEPS)
    model = nn.parallel.DistributedDataParallel(plain)
    sent = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: sent.append(1) or original(*args, **kwargs)
    try:
        counts = []
        for step in range(STEPS):
            train_step(model, optimizer, step)
            counts.append(len(sent))
    finally:
        dist.all_reduce = original
    assert counts == [1, 2, 2, 2], counts
    assert len(set(map(str, everywhere(averages(optimizer))))) == 1


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


# ---------------------------------------------------------------- an error of one rank alone

FALLING = {"start_bits": 9, "target_bits": 4, "schedule": {"finish_at": 0.8}}
#: With one scale over all shards ranks wait for each other whenever they write simulated values.
SCALES = ["per_channel", "per_tensor"]


def require_error(act, culprit: int, kind: type[Exception], text: str) -> None:
    """Requires the culprit's own error on it, and on the others one that names it."""
    try:
        act()
    except Exception as error:
        own = dist.get_rank() == culprit
        assert isinstance(error, kind if own else RuntimeError), error
        assert text in str(error), error
        assert own or str(error).startswith(f"rank {culprit} failed: {kind.__name__}: "), error
    else:
        raise AssertionError("a rank went on without the others")


def check_a_shard_that_is_not_finite_is_refused_on_all_ranks() -> None:
    culprit = dist.get_world_size() - 1
    for mesh in (None, mesh_of_stages()):
        for granularity in SCALES:
            model = fully_shard(part_of(0), mesh=mesh)
            if dist.get_rank() == culprit:
                model.layers[0].q_proj.weight.data.to_local().fill_(float("nan"))
            config = FALLING | {"granularity": granularity}
            refused = "layers.0.q_proj.weight: weights must be finite"
            require_error(partial(wrap, model, config, STEPS), culprit, ValueError, refused)


def check_a_state_that_one_rank_cannot_load_changes_no_rank() -> None:
    for granularity in SCALES:
        models, optimizers = [], []
        for _ in range(2):
            models.append(fully_shard(part_of(0)))
            config = FALLING | {"granularity": granularity}
            optimizers.append(wrap(models[-1], config, STEPS))
        optimizer = optimizers[0]
        bad = optimizer.state_dict()
        for model, each in zip(models, optimizers, strict=True):
            train_step(model, each, 0)
        if dist.get_rank() == 1:
            number = next(key for key, entry in bad["state"].items() if "moq_master" in entry)
            del bad["state"][number]["moq_master"]
        missing = "the state must hold a master of layers.0.q_proj.weight"
        require_error(partial(optimizer.load_state_dict, bad), 1, ValueError, missing)
        for step in (1, 2):
            for model, each in zip(models, optimizers, strict=True):
                train_step(model, each, step)
        assert optimizer.steps == 3
        for value, expected in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(value.to_local(), expected.to_local())


def check_what_fails_before_rank_0_writes_fails_on_all_ranks() -> None:
    directory = Path(os.environ["MOQ_TEST_DIRECTORY"]) / "out"
    optimizer = wrap(part_of(0), FALLING, STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        early = "weights have not reached their target"
        require_error(partial(optimizer.export, directory), 0, UserWarning, early)

    def full_disk() -> None:
        raise OSError("no space left")

    if dist.get_rank() == 0:
        optimizer.flush_logs = full_disk
    require_error(partial(optimizer.save, directory), 0, OSError, "no space left")
    training = Training(optimizer, "test", export=directory)
    require_error(training.end, 0, OSError, "no space left")
    assert not directory.exists()


def check_shards_that_are_to_be_exported_are_refused_before_the_first_step() -> None:
    directory = Path(os.environ["MOQ_TEST_DIRECTORY"]) / "shards"
    training = Training(wrap(fully_shard(part_of(0)), FALLING, STEPS), "test", export=directory)
    try:
        training.begin(0, STEPS)
    except RuntimeError as error:
        assert "the model must be whole to be written" in str(error)
    else:
        raise AssertionError("the error comes after the training")


def check_ranks_that_hold_different_weights_write_nothing() -> None:
    directory = Path(os.environ["MOQ_TEST_DIRECTORY"]) / "different"
    torch.manual_seed(dist.get_rank())
    plain = Decoder()
    optimizer = wrap(plain, FALLING, STEPS)
    model = nn.parallel.DistributedDataParallel(plain)  # broadcasts the simulated weights alone
    train_step(model, optimizer, 0)
    for write in (optimizer.save, optimizer.export):
        try:
            write(directory)
        except RuntimeError as error:
            assert "the ranks must hold the same weights to be written" in str(error)
        else:
            raise AssertionError("the weights of rank 0 stand for all")
    assert not directory.exists()


def check_a_rank_that_lost_its_state_ends_the_resumption_on_all_ranks() -> None:
    model = part_of(0)
    optimizer = wrap(model, FALLING, STEPS)
    if dist.get_rank() != 1:
        train_step(model, optimizer, 0)
    training = Training(optimizer, "test")
    lost = "the optimizer's state was not in its checkpoint"
    require_error(partial(training.begin, 1, STEPS), 1, RuntimeError, lost)


if __name__ == "__main__":
    main(globals())
