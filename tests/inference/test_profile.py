"""`moq bench --profile`: a decode step kernel by kernel."""

import json

import pytest
import torch

from moq.cli import main
from moq.inference import Engine
from moq.inference.profile import KernelTime, profile_decode, table


def test_the_table_has_times_bytes_and_shares():
    kernels = [
        KernelTime("sampling", 1, 4.0, 4.5, 0),
        KernelTime("up projection", 48, 96.0, 99.0, 192_000_000),
    ]
    header, first, second, between, step, bandwidth = table(kernels, 120.0, 4.0).splitlines()
    assert header.split() == ["kernel", "count", "us/step", "share", "MB", "TB/s", "of", "read"]
    assert first.split() == ["up", "projection", "48", "96.0", "80.0%", "192.00", "2.00", "50.0%"]
    assert second.split() == ["sampling", "1", "4.0", "3.3%", "0.00", "0.00", "0.0%"]
    assert between.split() == ["between", "steps", "(tokens)", "20.0"]
    assert step.split() == ["step", "120.0"]
    assert bandwidth == "read bandwidth of this GPU: 4.00 TB/s"


def test_a_kernel_that_takes_no_time_has_no_rate():
    assert KernelTime("inputs", 1, 0.0, 0.0, 8).terabytes_per_second == 0.0


def test_a_cpu_has_no_kernels_to_profile(model_directory, capsys):
    assert main(["bench", str(model_directory("llama")), "--new-tokens", "4", "--profile"]) == 1
    assert "bench: --profile needs --device cuda, got cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_two_steps_are_the_fewest(model_directory, gpu):
    engine = Engine.from_pretrained(model_directory("gpt2"), device=gpu)
    with pytest.raises(ValueError, match="--profile needs --new-tokens >= 3, got 2"):
        profile_decode(engine, [[1, 2, 3]], 2)


@pytest.mark.gpu
def test_the_command_counts_the_bytes_of_the_weights(gpu, smollm2, capsys):
    directory, model, _ = smollm2
    arguments = ["--device", "cuda", "--dtype", "int8", "--context", "64", "--profile"]
    assert main(["bench", str(directory), *arguments, "--json"]) == 0
    rows = {row["what"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    linears = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    read = sum(row["bytes"] for what, row in rows.items() if "projection" in what or what == "head")
    assert sum(linears) < read < 1.05 * sum(linears)  # a byte each, and scales
    assert rows["up projection"]["count"] == model.config.num_hidden_layers
    for row in rows.values():
        assert 0 < row["busy"] < row["step_microseconds"]
        assert row["share_of_read"] == row["terabytes_per_second"] / row["read_bandwidth"]
    assert rows["head"]["share_of_read"] > 0
    assert main(["bench", str(directory), *arguments]) == 0
    assert "up projection" in capsys.readouterr().out
