"""How a worker makes its checks as one rank of a job."""

import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import SkipTest

import torch
import torch.distributed as dist


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
        backend, init_method=f"file://{directory}/store", rank=rank, world_size=world_size
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
