"""The communicator between real ranks: values, equal bits over both transports, errors."""

import pytest
import torch
import torch.distributed as dist
from launch import WORKERS, run_ranks, start_ranks
from workers.collectives import SIZES, contribution

from moq import _C
from moq.inference.distributed import _group_for, broadcast_text, connect

TRANSPORTS = ["shared_memory", "c10d"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Directories with what every rank got: of two ranks that connect() starts, and of three whose
    script has called init_process_group itself, for all of them and for a group of two of them."""
    directories = {}
    for num_ranks, starter in ((2, "connect"), (3, "caller")):
        directories[num_ranks] = tmp_path_factory.mktemp(starter)
        run_ranks(num_ranks, [WORKERS / "collectives.py", directories[num_ranks], starter])
    return directories


@pytest.fixture(params=[(2, "world", 2), (3, "world", 3), (3, "subgroup", 2)], ids=str)
def results(request, jobs):
    num_ranks, group, size = request.param
    files = sorted(jobs[num_ranks].glob(f"{group}*.pt"))
    assert len(files) == size
    return [torch.load(file, weights_only=False) for file in files]


def test_ranks_of_one_host_choose_shared_memory(results):
    assert [rank["auto"] for rank in results] == ["shared_memory"] * len(results)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_rank_knows_its_place(results, transport):
    places = [(rank[transport]["rank"], rank[transport]["size"]) for rank in results]
    assert places == [(rank, len(results)) for rank in range(len(results))]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_sum_has_the_bits_of_the_sum_in_rank_order(results, transport, count):
    expected = contribution(0, count)
    for rank in range(1, len(results)):
        expected = expected + contribution(rank, count)
    for rank in results:
        assert torch.equal(rank[transport]["all_reduce_sum", count], expected)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_maximum_is_elementwise(results, transport, count):
    expected = torch.stack([contribution(rank, count) for rank in range(len(results))]).amax(0)
    for rank in results:
        assert torch.equal(rank[transport]["all_reduce_max", count], expected)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_maximum_keeps_nan(results, transport):
    for rank in results:
        maximum = rank[transport]["max_with_nan"]
        assert maximum[0].isnan() and maximum[1] == len(results) - 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_broadcast_copies_the_roots_tensor_of_any_dtype(results, transport, dtype):
    expected = torch.arange(7).add(len(results) - 1).to(dtype)
    for rank in results:
        assert torch.equal(rank[transport]["broadcast", str(dtype)], expected)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_text_of_rank_0_reaches_all_ranks(results, transport):
    assert all(rank[transport]["text"] == "rank 0: 北京" for rank in results)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_uneven_column_shards_are_joined_in_rank_order(results, transport):
    rows = torch.arange(5.0)[:, None] * 100
    shards = [rows + rank * 10 + torch.arange(3.0 * rank) for rank in range(len(results))]
    for rank in results:
        assert torch.equal(rank[transport]["gather"], torch.cat(shards, dim=1))


def test_ranks_that_sum_different_tensors_are_told_so():
    run_ranks(2, [WORKERS / "reduce_apart.py"])


@pytest.mark.parametrize("killed", [0, 1])  # rank 0 takes the rendezvous store with it
def test_a_killed_rank_is_named_by_all_others_over_c10d(killed):
    ranks = start_ranks(3, [WORKERS / "reduce_forever.py", "c10d"])
    try:
        for rank in ranks:
            while line := rank.stdout.readline():
                if "reduces" in line:
                    break
        ranks[killed].kill()
        named = (
            f"all_reduce_sum: every rank must take part, got no rank {killed} (process "
            f"{ranks[killed].pid}) of 3: its process has ended; its own output says why"
        )
        for rank in ranks[:killed] + ranks[killed + 1 :]:
            output, _ = rank.communicate(timeout=60)
            assert named in output
            assert rank.returncode != 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


# --------------------------------------------------------------------------------- one process


def test_a_process_without_a_launcher_holds_the_whole_model():
    communicator = connect()
    assert (communicator.rank, communicator.size, communicator.transport) == (0, 1, "none")


def test_one_process_keeps_its_own_text():
    assert broadcast_text(_C.single_process(), "straße 北京") == "straße 北京"


def test_one_process_gets_back_what_it_gives():
    communicator = _C.single_process()
    tensor = torch.randn(3, 5)
    expected = tensor.clone()
    communicator.all_reduce_sum(tensor)
    communicator.all_reduce_max(tensor)
    communicator.broadcast(tensor, 0)
    communicator.barrier()
    assert torch.equal(tensor, expected)
    assert torch.equal(communicator.all_gather_columns(tensor, [5]), expected)


def test_a_degree_other_than_the_number_of_ranks_is_refused():
    message = r"tp_size must be 1 or the number of ranks, got 2 with 1 ranks: .*--nproc-per-node 2"
    with pytest.raises(ValueError, match=message):
        connect(tp_size=2)


def test_a_group_beside_the_callers_is_made_once_and_ends_with_it():
    cpu = torch.device("cpu")
    for _ in range(2):
        dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            group = _group_for(cpu, None, "gloo")
            assert group is _group_for(cpu, None, "gloo") is not dist.group.WORLD
            dist.all_reduce(torch.ones(3), group=group)
        finally:
            dist.destroy_process_group()


def test_a_group_that_nobody_made_is_an_error():
    with pytest.raises(RuntimeError, match="no_such_group"):
        _C.make_communicator("no_such_group")


def test_an_unknown_transport_is_an_error():
    with pytest.raises(_C.Error, match="transport must be auto, shared_memory or c10d, got pigeon"):
        _C.make_communicator("group", "pigeon")


def test_only_float32_is_reduced():
    with pytest.raises(TypeError, match="all_reduce_sum: the tensor must be float32, got float64"):
        _C.single_process().all_reduce_sum(torch.zeros(4, dtype=torch.float64))


def test_only_a_contiguous_tensor_is_reduced():
    with pytest.raises(ValueError, match="all_reduce_sum: the tensor must be contiguous"):
        _C.single_process().all_reduce_sum(torch.zeros(4, 6).t())


def test_a_shard_of_another_width_is_an_error():
    with pytest.raises(ValueError, match=r"the shard of rank 0 must be \[m, 4\], got \[2, 5\]"):
        _C.single_process().all_gather_columns(torch.zeros(2, 5), [4])


def test_a_root_outside_the_group_is_an_error():
    with pytest.raises(ValueError, match=r"broadcast: root must be in \[0, 1\), got 1"):
        _C.single_process().broadcast(torch.zeros(2), 1)
