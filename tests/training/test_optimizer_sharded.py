"""fully_shard, DistributedDataParallel: one and two gloo processes give what one process gives.

Starting ranks costs seconds, so each number of ranks is started once and makes all the checks of
workers/sharded.py; the tests here report them one by one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "workers" / "sharded.py"
CHECKS = re.findall(r"^def check_(\w+)", WORKER.read_text(), re.MULTILINE)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={request.param}", str(WORKER)],
        env=os.environ | {"MOQ_TEST_DIRECTORY": str(directory), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return [
        json.loads((directory / f"results-{rank}.json").read_text())
        for rank in range(request.param)
    ]


@pytest.mark.parametrize("check", CHECKS)
def test_under_ranks(results, check):
    for rank, outcomes in enumerate(results):
        assert not outcomes[f"check_{check}"], f"rank {rank}:\n{outcomes[f'check_{check}']}"
