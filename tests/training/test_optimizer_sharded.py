"""fully_shard, DistributedDataParallel: one and two processes give what one process gives.

They talk through gloo on the CPU, and through NCCL where there are two GPUs.

Starting ranks costs seconds, so each number of ranks is started once and makes all the checks of
workers/sharded.py, replicas.py and measured.py; the tests here report them one by one.
"""

from pathlib import Path

import pytest
import torch
from tiny_decoder import in_processes
from workers.job import run_checks
from workers.ranks import CHECKS

WORKER = Path(__file__).parent / "workers" / "ranks.py"

RANKS = [
    pytest.param((1, "gloo"), id="1 rank"),
    pytest.param((2, "gloo"), id="2 ranks"),
    pytest.param((2, "nccl"), id="2 GPUs", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=RANKS)
def results(request, tmp_path_factory) -> list[dict[str, str]]:
    ranks, backend = request.param
    directory = tmp_path_factory.mktemp("ranks")
    if backend == "nccl":
        request.getfixturevalue("gpu")
        if torch.cuda.device_count() < ranks:
            pytest.skip(f"{torch.cuda.device_count()} of {ranks} GPUs: not tested with NCCL")
    if ranks == 1:
        return [run_checks(CHECKS, directory, 0, 1)]
    return in_processes(WORKER, ranks, directory, backend)


@pytest.mark.parametrize("check", CHECKS)
def test_under_ranks(results, check):
    if all(outcomes[check].startswith("skipped: ") for outcomes in results):
        pytest.skip(results[0][check].removeprefix("skipped: "))
    for rank, outcomes in enumerate(results):
        assert not outcomes[check], f"rank {rank}:\n{outcomes[check]}"
