"""The training steps that train_step.py times on every device, with moq and without."""

from collections.abc import Callable

import torch
from torch import nn

import moq
from moq.loggers import CsvLogger, TensorBoardLogger

LEARNING_RATE = 2e-5

Step = Callable[[], None]


def wrap(
    model: nn.Module,
    rounding: str,
    steps: int,
    logs: str | None = None,
    inner: type[torch.optim.AdamW] = torch.optim.AdamW,
    **adamw: bool,
) -> moq.MoQOptimizer:
    """The wrapper, 16 to 8 bits falling throughout; with a folder for logs it tells all it can."""
    loggers = [] if logs is None else [TensorBoardLogger(logs), CsvLogger(f"{logs}/moq.csv")]
    return moq.MoQOptimizer(
        inner(model.parameters(), lr=LEARNING_RATE, **adamw),
        model,
        {"rounding": rounding, "schedule": {"finish_at": 1.0}},
        total_steps=steps,
        verbose=logs is not None,
        loggers=loggers,
        log_every=1,
    )


def parts_of(
    called: nn.Module, optimizer: object, batch: dict[str, torch.Tensor]
) -> tuple[Step, Step]:
    """One training step in two parts: the passes, forward and backward, and the update."""

    def passes() -> None:
        called(**batch).loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return passes, update


def step_of(called: nn.Module, optimizer: object, batch: dict[str, torch.Tensor]) -> Step:
    """One training step."""
    passes, update = parts_of(called, optimizer, batch)

    def step() -> None:
        passes()
        update()

    return step
