"""Second-order sensitivity in a training: what is measured, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moq.blocks import follows_sensitivities
from moq.config import MoQConfig
from moq.masters import Masters

if TYPE_CHECKING:
    from moq.estimators import Sensitivity


def require_plannable(config: MoQConfig, masters: Masters, where: str) -> None:
    """Refuses to measure where a measurement could change nothing.

    Raises:
        ValueError: naming the key of the configuration that must be another.
    """
    remedy = "; moq.sensitivity.measure measures without planning"
    if not masters.matched:
        raise ValueError(f"{where}: at least one parameter must be quantized, got 0")
    if not follows_sensitivities(masters.blocks, config):
        raise ValueError(
            f"{where}: the schedule must be finish_at or period, which sensitivities stretch, got "
            f"schedule.table, which fixes the steps of every layer{remedy}"
        )
    if config.sensitivity.rule == "none":
        raise ValueError(
            f"{where}: sensitivity.rule must be 'stepped' or 'linear', got 'none'{remedy}"
        )


def measure_blocks(
    model: nn.Module,
    masters: Masters,
    config: MoQConfig,
    loss_fn: Callable[[Any], torch.Tensor],
    batches: Iterable[Any],
    options: Mapping[str, Any],
) -> Sensitivity:
    """Measures the blocks of a training as its configuration says, but for `options`."""
    from moq.sensitivity import measure

    section = config.sensitivity
    settings = {
        "measure": section.measure,
        "tolerance": section.tolerance,
        "max_products": section.max_products,
        "seed": config.seed,
    }
    return measure(model, masters.by_block(), loss_fn, batches, **(settings | dict(options)))


def plan_by(found: Sensitivity, masters: Masters, where: str) -> None:
    """Plans the rest of the schedule by a measurement.

    Raises:
        ValueError: if the blocks measured are not those of the training.
    """
    blocks = masters.by_block()
    moving = [name for name, members in blocks.items() if any(p.requires_grad for p in members)]
    differing = sorted(set(moving).symmetric_difference(found.blocks) - (blocks.keys() - moving))
    if differing:
        raise ValueError(
            f"{where}: the measurement must have the {len(moving)} blocks that train, "
            f"{', '.join(moving[:3])}…, got {len(found.blocks)} with or without {differing[0]}: "
            "measure moq.sensitivity.quantized_blocks(model, config)"
        )
    # Nothing in a block of frozen weights moves, so it need not wait.
    values = dict(zip(found.blocks, found.normalised, strict=True))
    masters.trainer.set_sensitivities([values.get(name, 0.0) for name in blocks])
