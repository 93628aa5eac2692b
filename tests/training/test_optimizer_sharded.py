"""fully_shard, DistributedDataParallel: one and two gloo processes give what one process gives.

Starting ranks costs seconds, so each number of ranks is started once and makes all the checks of
workers/sharded.py; the tests here report them one by one.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "workers" / "sharded.py"
CHECKS = re.findall(r"^def check_(\w+)", WORKER.read_text(), re.MULTILINE)


def in_processes(world_size: int, directory: Path) -> list[dict[str, str]]:
    """Starts every rank; they meet through a file."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(directory), str(rank), str(world_size)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        json.loads((directory / f"results-{rank}.json").read_text()) for rank in range(world_size)
    ]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request, tmp_path_factory) -> list[dict[str, str]]:
    directory = tmp_path_factory.mktemp("ranks")
    if request.param == 1:
        return [runpy.run_path(str(WORKER))["run_checks"](directory, 0, 1)]
    return in_processes(request.param, directory)


@pytest.mark.parametrize("check", CHECKS)
def test_under_ranks(results, check):
    for rank, outcomes in enumerate(results):
        assert not outcomes[f"check_{check}"], f"rank {rank}:\n{outcomes[f'check_{check}']}"
