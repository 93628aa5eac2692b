"""How a worker makes its checks as one rank of a job."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from unittest import SkipTest

import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=120)  # with ranks that do not come to a collective


def everywhere(value: object) -> list:
    """The values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def require_several_ranks() -> None:
    """Leaves a check that says nothing of one rank alone.

    Raises:
        SkipTest: if there is only one.
    """
    if dist.get_world_size() == 1:
        raise SkipTest("one rank alone shares nothing with another")


def run_checks(
    functions: Mapping[str, Callable[[], None]],
    directory: Path,
    rank: int,
    world_size: int,
    backend: str = "gloo",
) -> dict[str, str]:
    """Makes every check, ``check_…``; returns its traceback if it failed, "" if not.

    Of one that raises SkipTest it returns ``skipped: `` and the reason.
    """
    os.environ["MOQ_TEST_DIRECTORY"] = str(directory)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world_size,
        timeout=PATIENCE,
    )
    outcomes = {}
    for name, check in sorted(functions.items()):
        if name.startswith("check_"):
            print(name, flush=True)  # a rank that never ends was last here
            try:
                check()
                outcomes[name] = ""
            except SkipTest as reason:
                outcomes[name] = f"skipped: {reason}"
            except Exception:
                outcomes[name] = traceback.format_exc()
    dist.destroy_process_group()
    return outcomes


def main(functions: Mapping[str, Callable[[], None]]) -> None:
    """Makes the checks as the command line says: DIRECTORY RANK WORLD_SIZE BACKEND.

    Writes results-RANK.json, {check: error or ""}, into the directory.
    """
    where, own_rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    found = run_checks(functions, where, own_rank, ranks, sys.argv[4])
    (where / f"results-{own_rank}.json").write_text(json.dumps(found))
    # Not through the interpreter's exit: under load torch's own threads may outlive what they use.
    os._exit(0)
