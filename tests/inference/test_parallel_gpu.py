"""Tensor parallelism on GPUs, over NCCL: two ranks draw the tokens of one."""

import json
import os
import subprocess
import sys

import models
import pytest
import torch
from launch import WORKERS, one_thread_environment, torchrun_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

# Unequal shares of heads, columns and vocabulary; one head for two ranks is refused elsewhere.
NAMES = ["llama", "nine_heads", "gpt2", "bloom", "qwen3", "gpt_neox"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    for name in NAMES:
        (directory / name).mkdir()
        models.save(name, models.build(name), directory / name)
    return directory


VARIANTS = [
    {"dtype": "fp32"},
    {"dtype": "int8", "compute_dtype": "fp32"},
    {"dtype": "int8", "compute_dtype": "fp32", "activations": "dynamic"},
]


def tokens_of(directory, num_ranks):
    prompts = models.sequences(3, 20, 41)
    command = [WORKERS / "gpu_rank.py", directory, json.dumps(prompts), json.dumps(VARIANTS)]
    launcher = torchrun_command(num_ranks, *command)
    if num_ranks == 1:
        launcher = [sys.executable, *map(str, command)]
    result = subprocess.run(
        launcher,
        env=one_thread_environment(PYTHONPATH=os.pathsep.join(sys.path), PYTHONSAFEPATH="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["tp_size"] == num_ranks
    return answer["results"]


def test_a_rank_out_of_memory_tells_the_other_and_both_go_on(directory):
    result = subprocess.run(
        torchrun_command(2, WORKERS / "gpu_rank_out_of_memory.py", directory / "llama"),
        env=one_thread_environment(PYTHONPATH=os.pathsep.join(sys.path), PYTHONSAFEPATH="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rank 0: engine: the KV cache must be made on all ranks") == 2
    assert result.stdout.count("rank 1: engine: the KV cache must fit into the memory") == 2
    assert result.stdout.count("went on") == 2


def test_two_gpus_draw_the_tokens_of_one(directory):
    one, two = (tokens_of(directory, ranks) for ranks in (1, 2))
    assert len(one) == len(NAMES) * len(VARIANTS)
    for name, (first, again, _) in one.items():
        assert first == again, name  # the second time by captured steps
    assert two == one
