"""Ranks that hold different things: parts of a model, shards of a sub-mesh, an error of one alone.

Starting ranks costs seconds, so four are started once and make all the checks of workers/apart.py;
the tests here report them one by one.
"""

import re
from pathlib import Path

import pytest
from tiny_decoder import in_processes

WORKER = Path(__file__).parent / "workers" / "apart.py"
CHECKS = re.findall(r"^def check_(\w+)", WORKER.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    return in_processes(WORKER, 4, tmp_path_factory.mktemp("apart"))


@pytest.mark.parametrize("check", CHECKS)
def test_on_four_ranks(results, check):
    for rank, outcomes in enumerate(results):
        assert not outcomes[f"check_{check}"], f"rank {rank}:\n{outcomes[f'check_{check}']}"
