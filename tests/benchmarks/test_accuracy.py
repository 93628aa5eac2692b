"""accuracy.py: its small mode on a CPU, resuming, and its tables."""

import json
import subprocess
import sys
from pathlib import Path

import accuracy
import accuracy_cells
import accuracy_table
import pytest
import torch
from accuracy_tasks import FUSED_BERT, FUSED_LLAMA

import moq

SCRIPT = Path(accuracy.__file__)


def run(folder: Path, *arguments: str) -> str:
    places = [f"--{name}-dir={folder / name}" for name in ("data", "work")]
    command = [sys.executable, str(SCRIPT), "--small", "--device=cpu", *places]
    command += [f"--results={folder / 'results.jsonl'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(900)
def test_the_small_mode_runs_every_cell_once_and_prints_the_tables(tmp_path):
    first = run(tmp_path, "--time-limit=0.001")
    assert "cells are left for the next run" in first
    page = tmp_path / "page.md"
    page.write_text(f"before\n{accuracy_table.BEGIN}\n{accuracy_table.END}\nafter\n")
    printed = run(tmp_path, f"--document={page}")
    tables = page.read_text().removeprefix("before\n").removesuffix("after\n")
    assert printed.rstrip().endswith(tables.split("\n\n", 1)[1].rpartition("\n\n")[0])
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    methods = [result["method"] for result in results]
    assert sorted(methods) == sorted(accuracy.SMALL_BITS)
    by_method = {result["method"]: result for result in results}
    assert by_method["trace"]["bytes"] == by_method["ptq"]["bytes"] < by_method["budget"]["bytes"]
    assert by_method["budget"]["mean_bits"] <= 4.5
    assert by_method["eigenvalue"]["products"] > by_method["trace"]["products"] > 0
    for result in results:
        assert {"machine", "versions", "date", "seconds", "settings"} <= result.keys()
    for label in ("FP32", "MoQ + trace", "25 fused blocks"):
        assert f"{label} |" in printed
    assert run(tmp_path, "--list").strip() == ""


def result(method: str, bits: float, seed: int, score: float) -> dict:
    return {
        "model": "M",
        "data": "D",
        "task": "wordnet",
        "method": method,
        "bits": bits,
        "seed": seed,
        "metric": "accuracy",
        "score": score,
        "bytes": 4_000_000,
        "seconds": 1.0,
        "settings": "s",
        "training": {
            "first_steps": 1,
            "steps": 2,
            "batch_size": 3,
            "learning_rate": 1e-4,
            "granularity": "per_channel",
        },
        "machine": "a CPU, 2 cores",
        "versions": "torch 2, moq abc",
        "date": "2026-01-01",
    }


def test_a_table_has_mean_deviation_and_the_difference_seed_by_seed(tmp_path):
    results = [
        result(method, 4, seed, score + seed)
        for method, score in (("time", 50.0), ("trace", 51.0))
        for seed in (0, 1)
    ]
    document = tmp_path / "page.md"
    document.write_text(f"before\n{accuracy_table.BEGIN}\nold\n{accuracy_table.END}\nafter\n")
    text = accuracy_table.render(results, document)
    assert "| 4 | 4.00 | MoQ + trace | 51.50 ± 0.71 | 2 | +1.00 ± 0.00 (MoQ by time) |" in text
    assert document.read_text().startswith("before\n") and "old" not in document.read_text()
    document.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        accuracy_table.render(results, document)


def test_weights_are_rounded_as_the_optimizer_rounds_them():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    config = {"start_bits": 4, "target_bits": 4, "rules": [{"match": "*", "modules": ["linear"]}]}
    optimizer = moq.MoQOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, config, total_steps=1, verbose=False
    )
    simulated = {name: value.detach().clone() for name, value in model.named_parameters()}
    weights = accuracy_cells.weights_of(optimizer)
    accuracy_cells.show_masters(model, weights)
    assert not torch.equal(model[0].weight, simulated["0.weight"])
    accuracy_cells.round_weights(model, weights, dict.fromkeys(optimizer.num_bits, 4))
    for name, value in model.named_parameters():
        assert torch.equal(value, simulated[name])


@pytest.mark.parametrize(
    ("pattern", "layer", "groups"),
    [
        (
            FUSED_BERT,
            "bert.encoder.layer.3.",
            [
                ["attention.self.query", "attention.self.key", "attention.self.value"],
                ["attention.output.dense"],
                ["intermediate.dense"],
                ["output.dense"],
            ],
        ),
        (
            FUSED_LLAMA,
            "model.layers.12.",
            [
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
                ["mlp.down_proj"],
            ],
        ),
    ],
)
def test_fused_blocks_are_what_inference_fuses(pattern, layer, groups):
    found = [{accuracy_cells.found_block(pattern, layer + name) for name in g} for g in groups]
    assert all(len(names) == 1 for names in found)
    assert len(set.union(*found)) == len(groups)
