"""Latency of an all-reduce between processes of this machine: moq's shared memory against gloo.

Every size is measured in rounds that alternate between the two, and the best and the median of the
rounds are printed: other load on the machine shows in the median first. More ranks than idle cores
measure the scheduler.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from report import Row, print_rows

from moq.inference.distributed import connect

KILOBYTES = [1, 4, 16, 64, 256, 1024]


def seconds_per_call(reduce: Callable[[torch.Tensor], object], kilobytes: int, calls: int) -> float:
    """Seconds per call of `calls` all-reduces in a row, after a common start."""
    tensor = torch.zeros(kilobytes * 256)
    reduce(tensor)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        reduce(tensor)
    return (time.perf_counter() - start) / calls


def measure(rounds: int, as_json: bool) -> None:
    """One rank of the measurement; rank 0 prints."""
    communicator = connect(transport="shared_memory")
    rows = []
    for kilobytes in KILOBYTES:
        moq_times, gloo_times = [], []
        for _ in range(rounds):
            moq_times.append(seconds_per_call(communicator.all_reduce_sum, kilobytes, 200))
            gloo_times.append(seconds_per_call(dist.all_reduce, kilobytes, 10))
        case = f"all-reduce {kilobytes} KB, {communicator.size} ranks"
        for name, choose in (("best", min), ("median", statistics.median)):
            moq, gloo = choose(moq_times) * 1e6, choose(gloo_times) * 1e6
            rows.append(Row(f"{case}, {name} of {rounds}", moq, gloo, "us"))
    if communicator.rank == 0:
        print_rows("all-reduce latency", "gloo", rows, as_json)


def start_ranks(num_ranks: int) -> int:
    """Runs this program as every rank; the first exit status that is not 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(num_ranks):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | common | {"RANK": str(rank)}
        ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    return next(filter(None, [rank.wait() for rank in ranks]), 0)


def main() -> int:
    """Parses the command line; starts the ranks, or is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        return start_ranks(arguments.ranks)
    torch.set_num_threads(1)
    measure(arguments.rounds, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
