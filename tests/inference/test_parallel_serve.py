"""Serving under torchrun: the real decoder on two ranks, and how a job ends when something dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from launch import (
    WORKERS,
    is_running,
    one_thread_environment,
    start_ranks,
    torchrun_command,
    wait_until,
)

from moq.inference import Engine

PROMPT = "My fellow Americans, the state of our union is"


def test_two_ranks_write_the_tokens_of_one_process_to_a_prompt_from_a_pipe(smollm2):
    directory, _, tokenizer = smollm2
    options = ["generate", directory, "--max-new-tokens", "24", "--ignore-eos", "--json"]
    result = subprocess.run(
        torchrun_command(2, "-m", "moq.inference", *options),
        input=PROMPT,
        env=one_thread_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()  # rank 0 prints, once
    answer = json.loads(line)
    engine = Engine.from_pretrained(directory)
    expected = engine.generate(tokenizer(PROMPT)["input_ids"], 24, stop_token_ids=[])
    assert answer["token_ids"] == expected.token_ids
    assert (answer["tp_size"], answer["transport"]) == (2, "shared_memory")


class Job:
    """A torchrun job of two ranks in the background, its output in a file."""

    def __init__(self, log: Path, *command: str | os.PathLike) -> None:
        self._log = log
        with log.open("w") as file:
            self.launcher = subprocess.Popen(
                torchrun_command(2, *command),
                env=one_thread_environment(PYTHONUNBUFFERED="1"),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.ranks: Sequence[int] = ()

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str | re.Pattern) -> None:
        """Waits until the output matches, and notes which process is which rank."""
        wait_until(lambda: re.search(pattern, self.output), 600, f"output matches {pattern!r}")
        children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text()
        by_rank = {}
        for child in map(int, children.split()):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            for variable in variables:
                if variable.startswith(b"RANK="):
                    by_rank[int(variable[5:])] = child
        self.ranks = [by_rank[0], by_rank[1]]

    def assert_nothing_is_left(self) -> None:
        # The ranks' shared memory has no name: it ends with the last process that has it open.
        assert not any(is_running(process) for process in self.ranks)

    def end(self) -> None:
        for process in (self.launcher.pid, *self.ranks):
            if is_running(process):
                os.kill(process, signal.SIGKILL)
        self.launcher.wait()


@pytest.fixture
def start_job(tmp_path):
    jobs = []

    def start(*command: str | os.PathLike) -> Job:
        jobs.append(Job(tmp_path / "log", *command))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


LONG_ANSWER = ["--prompt", PROMPT, "--max-new-tokens", "4000", "--ignore-eos", "--stream"]
ANSWER_BEGINS = re.compile(r"(?m)^ [a-z]+")


def test_a_killed_rank_ends_the_job_with_an_error_that_names_it(smollm2, start_job):
    job = start_job("-m", "moq.inference", "generate", smollm2[0], *LONG_ANSWER)
    job.wait_for(ANSWER_BEGINS)
    os.kill(job.ranks[1], signal.SIGKILL)
    assert job.launcher.wait(timeout=60) != 0
    # torchrun's own report: whether rank 0 writes its error before it is ended too is chance.
    assert re.search(r"rank +: 1 ", job.output)
    assert f"(SIGKILL) received by PID {job.ranks[1]}" in job.output
    job.assert_nothing_is_left()


def test_a_rank_whose_peer_was_killed_names_it(smollm2):
    # Without torchrun, which ends the others within 0.1 s.
    ranks = start_ranks(2, ["-m", "moq.inference", "generate", smollm2[0], *LONG_ANSWER])
    try:
        written = ""
        while not ANSWER_BEGINS.search(written):
            character = ranks[0].stdout.read(1)
            assert character, written  # it ended before
            written += character
        ranks[1].kill()
        output, _ = ranks[0].communicate(timeout=60)
        named = f"got no rank 1 (process {ranks[1].pid}) of 2: its process has ended"
        assert named in output
        assert ranks[0].returncode != 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_rank_that_starts_after_torchrun_was_killed_ends_with_an_error(tmp_path):
    with socket.socket() as taken:  # by somebody who does not listen: nobody else can have it
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        # As torchrun sets them.
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        result = subprocess.run(
            [sys.executable, WORKERS / "reduce_forever.py"],
            env=one_thread_environment(TORCHELASTIC_USE_AGENT_STORE="True", **place),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode != 0
    assert f"torchrun must be reachable at 127.0.0.1:{port}, got" in result.stderr


def test_no_rank_outlives_a_killed_torchrun(start_job):
    job = start_job(WORKERS / "reduce_forever.py")
    job.wait_for("rank 0 reduces")
    os.kill(job.launcher.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, job.ranks)), 20, "the ranks have ended")
    job.assert_nothing_is_left()
