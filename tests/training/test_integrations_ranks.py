"""Trainer, accelerate and Lightning on two ranks, as torchrun starts them.

Starting ranks costs seconds, so they are started once and make all the checks of workers/tools.py;
the tests here report them one by one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

WORKER = Path(__file__).parent / "workers" / "tools.py"
CHECKS = re.findall(r"^def check_(\w+)", WORKER.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    directory = tmp_path_factory.mktemp("tools")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(WORKER), str(directory)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((directory / f"results-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(results, check):
    for rank, outcomes in enumerate(results):
        assert not outcomes[f"check_{check}"], f"rank {rank}:\n{outcomes[f'check_{check}']}"
