"""Starts the ranks of a job as real processes."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
from scripts import same_modules

WORKERS = Path(__file__).parent / "workers"


def torchrun_command(num_ranks: int, *command: str | os.PathLike) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(num_ranks), *map(str, command)]


def one_thread_environment(**variables: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | variables


def run_gpu_ranks(
    worker: Path, num_ranks: int, directory: Path, variants: list[dict[str, str]], **variables: str
) -> dict[str, Any]:
    """Runs gpu_rank.py, or what calls it, as so many ranks; returns what rank 0 printed."""
    prompts = json.dumps(models.sequences(3, 20, 44))
    command = [worker, directory, prompts, json.dumps(variants)]
    launcher = torchrun_command(num_ranks, *command)
    if num_ranks == 1:
        launcher = [sys.executable, *map(str, command)]
    result = subprocess.run(
        launcher,
        env=one_thread_environment(**same_modules(), **variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["tp_size"] == num_ranks
    return answer["results"]


def start_ranks(num_ranks: int, command: Sequence[str | os.PathLike]) -> list[subprocess.Popen]:
    """Starts `python command` as every rank, its output in a pipe.

    Sets the variables that torchrun sets, but saves the seconds that torchrun takes to start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        environment = one_thread_environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        ranks.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return ranks


def run_ranks(num_ranks: int, command: Sequence[str | os.PathLike], timeout: float = 120) -> None:
    """Runs `python command` as every rank; asserts that none fails, showing its output."""
    ranks = start_ranks(num_ranks, command)
    deadline = time.monotonic() + timeout
    try:
        for rank, process in enumerate(ranks):
            output, _ = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            assert process.returncode == 0, f"rank {rank} of {num_ranks}:\n{output}"
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def is_running(process_id: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition, seconds: float, what: str) -> None:
    """Polls until condition() holds; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
