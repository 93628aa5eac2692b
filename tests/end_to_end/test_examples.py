"""The examples of the integrations, run as a user runs them, in a few steps on the real model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS, HELD_OUT = 4, 32


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def trainer_scalars(run_folder: Path) -> set[str]:
    state = json.loads((run_folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return {name for entry in state["log_history"] for name in entry}


def lightning_scalars(run_folder: Path) -> set[str]:
    (metrics,) = run_folder.rglob("metrics.csv")
    return set(metrics.read_text().splitlines()[0].split(","))


def accelerate_scalars(run_folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names: set[str] = set()
    for file in run_folder.rglob("events.*"):
        names |= set(EventAccumulator(str(file)).Reload().Tags()["scalars"])
    return names


@pytest.mark.parametrize(
    ("example", "module", "scalars"),
    [
        ("with_trainer", "accelerate", trainer_scalars),
        ("with_lightning", "lightning", lightning_scalars),
        ("with_accelerate", "accelerate", accelerate_scalars),
    ],
)
def test_an_example_trains_reports_exports_and_serves(tmp_path, example, module, scalars):
    pytest.importorskip(module)
    output = tmp_path / "model"
    sizes = ["--steps", str(STEPS), "--held-out", str(HELD_OUT), "--output", str(output)]
    done = run([str(ROOT / "examples" / f"{example}.py"), *sizes], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"the same prediction on {HELD_OUT} of {HELD_OUT}" in done.stdout
    assert "37 quantized parameters" in done.stdout
    assert {"moq/bits", "moq/quantization_error", "moq/flips"} <= scalars(tmp_path / "model-run")
    verified = run(["-m", "moq", "verify", str(output)], tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    weights = json.loads((output / "moq.json").read_text())["weights"]
    assert {entry["trained_bits"] for entry in weights.values()} == {8}
