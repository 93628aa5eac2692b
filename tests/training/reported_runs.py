"""Runs for the tests of `moq report`: a whole training, and one of hundreds of layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_decoder import Logits, tiny_llama, train_step, wrap

import moq
from moq.loggers import CsvLogger
from moq.report_data import Layer, RunRecord
from moq.report_page import page
from moq.report_weights import LayerWeights, RunWeights, WidthTotal

STEPS = 24
SECTIONS = (
    "plan", "bits", "sensitivity", "spectrum", "front", "size", "figures", "error", "cost",
    "layers",
)  # fmt: skip
HOSTILE = 'loss <img src="https://example.org/x">'


def training(**options):
    model = tiny_llama(layers=3)
    config = {"start_bits": 16, "target_bits": 4, "schedule": {"finish_at": 0.75}}
    return model, wrap(model, config, STEPS, **options)


def loss_of(model):
    return lambda ids: model(input_ids=ids, labels=ids).loss


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(seed))


def train_reported(folder: Path) -> tuple[moq.MoQOptimizer, Path]:
    """A whole training with everything that a page can show: (optimizer, directory of the run)."""
    model, optimizer = training(loggers=CsvLogger(folder / "moq.csv"), log_every=2)
    optimizer.probe(loss_of(model), [tokens(1)], max_cost=None, progress=False)
    for step in range(STEPS):
        optimizer.log({"loss": train_step(Logits(model), optimizer, step), HOSTILE: float(step)})
        if step == 9:
            optimizer.probe(loss_of(model), [tokens(2)], max_cost=None, progress=False)
    optimizer.log({"accuracy": 0.5})
    optimizer.save(folder / "run & more")
    moq.spectral_density(
        loss_of(model),
        [tokens(3)],
        optimizer,
        blocks=["model.layers.1"],
        steps=6,
        probes=2,
        run=folder / "run & more",
        progress=False,
    )
    return optimizer, folder / "run & more"


def layer(index: int, steps: int) -> Layer:
    plan = [(0, 16), (steps // 4, 8), (steps // 4 + index, 4)]
    return Layer(f"h.{index}", f"h.{index}", plan, plan, plan, plan)


def deep_page() -> str:
    """The page of a run with 300 layers and 100,000 steps."""
    layers = [layer(index, 100_000) for index in range(300)]
    logged = {f"moq/flips/h.{i}": [(100.0 * s, 0.1) for s in range(400)] for i in range(300)}
    record = RunRecord(
        directory=Path("deep"), model="Big", step=40_000, total_steps=100_000, layers=layers,
        chosen={},
        probes=[], scalars=logged | {"moq/flips": [(1.0, 0.1)]}, scalars_file=None, spectra=[],
        seconds_per_step=None, blocks={},
    )  # fmt: skip
    own = {one.name: LayerWeights(100, 50, 1.0, 100.0) for one in layers}
    weights = RunWeights(own, {4: WidthTotal(300, 30000, 15000)}, 40000, 40000, 30000)
    return page(record, weights, "no front", "")


def damage(path: Path, change: Callable[[Any], object]) -> None:
    """Changes what a JSON file holds."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
